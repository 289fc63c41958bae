"""Evaluation: run a trained network on validation and test images, and store the outputs of all exits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from exitkit.data.base import Batch, Data, Part
from exitkit.data.lazy import UnreadableImages
from exitkit.engine.devices import choose_device, process_settings
from exitkit.engine.engine import Engine
from exitkit.errors import Note, UserError
from exitkit.files import disk_error, drafted, save_tensors, write_json, write_text
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.costs import cost
from exitkit.runs.classes import ClassHits, class_table
from exitkit.runs.embeddings import check_linear, curvature, embeddings_of, names_of
from exitkit.runs.folder import CLASSES, CURVATURE, RESULTS, RunFolder, embeddings_file
from exitkit.runs.formats import left_out
from exitkit.runs.job import images_digest, load_evaluated, load_network
from exitkit.runs.recipe import Recipe, ResolvedRecipe
from exitkit.runs.table import table_of
from exitkit.strategy.base import at_least_float32

if TYPE_CHECKING:
    import pandas as pd

_BATCH = 256
_PARTS: tuple[Part, ...] = ("validation", "test")
# Up to this number of classes logits are stored in float32; for more (ImageNet) in float16, to save gigabytes.
_FLOAT32_CLASSES = 200


def evaluate(
    run: RunFolder | str | Path,
    *,
    device: str | None = None,
    data_dir: str | None = None,
    embeddings: bool = False,
    tell: Callable[[float], None] = lambda share: None,
) -> pd.DataFrame:
    """Evaluate a trained run (in fp32), and write its outputs, costs and results into its folder.

    Args:
        run: a trained run, or its folder.
        device: device to run on; by default that of the recipe.
        data_dir: folder of the images; by default that of the recipe.
        embeddings: whether to store the embeddings of the exits and their curvature as well, which last-layer Laplace
            reads (see `exitkit.runs.embeddings`); otherwise those of an earlier evaluation are removed.
        tell: called with the share of the images that is done, 0..1.

    Returns:
        one row per exit, with the columns of `load_runs`.

    Raises:
        UserError: the run does not exist, its weights or images are missing, or the images differ from those that it
            was evaluated on before; or embeddings are requested, and an exit is not linear or a training image missing.
    """
    run = RunFolder.of(run)
    overrides = {"device": device, "data_dir": data_dir}
    with run.held():
        recipe = run.recipe.with_values(**{key: value for key, value in overrides.items() if value is not None})
        evaluate_held(run, recipe, tell, strict=True, embeddings=embeddings)
    return table_of([run])


def evaluate_held(
    run: RunFolder,
    recipe: ResolvedRecipe,
    tell: Callable[[float], None] = lambda share: None,
    strict: bool = False,
    embeddings: bool = False,
) -> None:
    """Evaluate as `evaluate` does, on the recipe's device and data folder; the caller must hold the run's lock.

    Images that are missing, damaged, or (unless `strict`) replaced by others are left out, with a `Note`. The files
    replace earlier ones when all of them are written.
    """
    engine = Engine(choose_device(recipe.device))
    with process_settings(engine.device, threads=recipe.threads), drafted(run.path / "evaluation") as draft:
        loaded, messages = load_evaluated(run, recipe.data_dir, strict)
        data, earlier = loaded.on(engine.device), _earlier_digest(run)
        network = load_network(run, data)
        if embeddings:
            check_linear(network)
        write_json(draft / "cost.json", [row._asdict() for row in cost(network)])
        engine.place(network)
        results: dict[str, Any] = {}
        counted: dict[str, ClassHits] = {}
        counts = {part: len(data.labels(part)) for part in _PARTS}
        total = sum(counts.values()) + (len(data.labels("train")) if embeddings else 0)
        before = 0

        def progress(done: int) -> None:
            tell((before + done) / total)

        for part in _PARTS:
            unread: list[str] = []
            augment = augment_validation(recipe, part)
            outputs = collect_outputs(network, data, part, engine, augment, progress, unread, embeddings=embeddings)
            if unread:
                messages.setdefault(part, []).extend(unread)
            before += counts[part]
            if embeddings:
                kept = {name: outputs.pop(name) for name in names_of(network.num_exits)}
                save_tensors(draft / embeddings_file(part), kept, run.name)
            save_tensors(draft / f"outputs-{part}.safetensors", outputs, run.name)
            hits = outputs["logits"].argmax(2) == outputs["labels"][:, None]
            results[part] = (100 * hits.double().mean(0)).tolist()
            counted[part] = ClassHits.count(outputs["logits"].numpy(), outputs["labels"].numpy())
        if embeddings:
            save_tensors(draft / CURVATURE, curvature(network, data, engine, progress), run.name)
        write_text(draft / CLASSES, class_table(counted).to_csv(index=False))
        # The digest is of the images that the run was trained on, even if some of them are gone by now.
        images = earlier or (run.environment().get("images") if messages else images_digest(recipe))
        results |= ({"images": images} if images else {}) | ({"left_out": dict(messages)} if messages else {})
        write_json(draft / RESULTS, results)
        _publish(draft, run.path)
    for part, texts in messages.items():
        warnings.warn(Note(f"{run.path.name} is evaluated {left_out(part, texts)}"), stacklevel=2)


def _publish(draft: Path, folder: Path) -> None:
    """Move the files of an evaluation into the run's folder; until the last one, the results, it is not finished."""
    try:
        (folder / RESULTS).unlink(missing_ok=True)
        for name in (CURVATURE, *map(embeddings_file, _PARTS)):  # of an earlier evaluation
            (folder / name).unlink(missing_ok=True)
        for path in sorted(draft.iterdir(), key=lambda path: path.name == RESULTS):
            path.replace(folder / path.name)
    except OSError as error:
        raise disk_error(folder, error) from None


def _earlier_digest(run: RunFolder) -> str | None:
    """Return the digest of the images in the results that are to be replaced, if there are any."""
    try:
        digest: str | None = run.results().get("images")
    except UserError:  # there are none, or they are damaged
        return None
    return digest


def augment_validation(recipe: Recipe, part: Part) -> bool:
    """Whether a part is augmented like training images; an option for validation, which the papers use."""
    return part == "validation" and recipe.dataset_settings.get("val_transform") == "train"


@torch.inference_mode()
def collect_outputs(
    network: MultiExitNetwork,
    data: Data,
    part: Part,
    engine: Engine,
    augment: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    unread: list[str] | None = None,
    *,
    embeddings: bool = False,
) -> dict[str, Tensor]:
    """Return logits [N, K, C] of all exits, labels [N] and indices [N] (in the data set's order) of one part.

    Args:
        network: the network.
        data: the images.
        part: the part.
        engine: this process's engine.
        augment: whether the images are augmented as in training.
        progress: called with the number of images that are done.
        unread: takes the messages about images that can't be read, which are left out; None: they are an error.
        embeddings: whether to add the exits' embeddings, embedding_1 [N, d_1], ..., embedding_K [N, d_K].
    """
    network.eval()
    pieces, positions = [], []
    embedded: dict[str, list[Tensor]] = {}
    for where, batch in _readable(data, part, augment, unread):
        answer = network(engine.placement.images(batch.images))
        pieces.append(torch.stack(answer.logits, 1).cpu())
        for name, tensor in embeddings_of(answer).items() if embeddings else ():
            embedded.setdefault(name, []).append(tensor)
        positions.append(where)
        progress(sum(map(len, pieces)))
    dtype = torch.float32 if data.num_classes <= _FLOAT32_CLASSES else torch.float16
    read = torch.cat(positions)
    return {
        "logits": torch.cat(pieces).to(dtype),
        "labels": data.labels(part)[read],
        "indices": getattr(data.split, part)[read],
        **{name: torch.cat(tensors) for name, tensors in embedded.items()},
    }


def _readable(data: Data, part: Part, augment: bool, unread: list[str] | None) -> Iterator[tuple[Tensor, Batch]]:
    """Yield the positions of each batch and the batch, without images that can't be read."""
    waiting = list(torch.arange(len(data.labels(part))).split(_BATCH))
    left = len(waiting)
    while waiting:
        try:
            for batch in data.batches(part, list(waiting), augment=augment, seed=0):
                yield waiting.pop(0), batch
        except UnreadableImages as error:
            if unread is None:
                raise
            unread += error.messages.values()
            kept = [position for position in waiting[0].tolist() if position not in error.messages]
            waiting[:1] = [torch.tensor(kept)] if kept else []
            left -= not kept
            if not left:
                raise


@torch.inference_mode()
def measure(network: MultiExitNetwork, data: Data, part: Part, engine: Engine, augment: bool = False) -> Tensor:
    """Return sums of losses and hits [2, K] and the count as one vector [2K + 1], over this rank's share of a part."""
    network.eval()
    local = torch.arange(engine.ranks.rank, len(data.labels(part)), engine.ranks.world)
    sums = torch.zeros(2, network.num_exits, dtype=torch.float64)
    positions = local.split(_BATCH) if len(local) else ()  # more ranks than images
    for batch in data.batches(part, positions, augment=augment, seed=0):
        labels = engine.placement.labels(batch.labels)
        with engine.arithmetic.autocast():
            logits = network(engine.placement.images(batch.images)).logits
        losses = torch.stack([F.cross_entropy(at_least_float32(output), labels, reduction="sum") for output in logits])
        hits = torch.stack([(output.argmax(1) == labels).sum() for output in logits])
        sums += torch.stack([losses.cpu().double(), hits.cpu().double()])
    return torch.cat([sums.flatten(), torch.tensor([float(len(local))], dtype=torch.float64)])
