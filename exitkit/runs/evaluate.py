"""Evaluation: run a trained network on validation and test images, and store the outputs of all exits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from exitkit.data.base import Data, Part
from exitkit.engine.devices import choose_device, process_settings
from exitkit.engine.engine import Engine
from exitkit.files import save_tensors, write_json
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.costs import cost
from exitkit.runs.folder import RESULTS, SPLIT, RunFolder
from exitkit.runs.job import check_images, images_digest, load_data, load_network
from exitkit.runs.recipe import Recipe, ResolvedRecipe
from exitkit.runs.table import table_of
from exitkit.strategy.base import at_least_float32

if TYPE_CHECKING:
    import pandas as pd

_BATCH = 256
# Up to this number of classes logits are stored in float32; for more (ImageNet) in float16, to save gigabytes.
_FLOAT32_CLASSES = 200


def evaluate(
    run: RunFolder | str | Path,
    *,
    device: str | None = None,
    data_dir: str | None = None,
    tell: Callable[[float], None] = lambda share: None,
) -> pd.DataFrame:
    """Evaluate a trained run (in fp32), and write its outputs, costs and results into its folder.

    Args:
        run: a trained run, or its folder.
        device: device to run on; by default that of the recipe.
        data_dir: folder of the images; by default that of the recipe.
        tell: called with the share of the images that is done, 0..1.

    Returns:
        one row per exit: exit, papers, macs, params, accuracy and validation_accuracy (percent), and the run's columns.

    Raises:
        UserError: the run does not exist, its weights or images are missing, or the images differ from those that it
            was evaluated on before.
    """
    run = RunFolder.of(run)
    overrides = {"device": device, "data_dir": data_dir}
    with run.held():
        recipe = run.recipe.with_values(**{key: value for key, value in overrides.items() if value is not None})
        check_images(run, recipe)
        evaluate_held(run, recipe, tell)
    return table_of([run])


def evaluate_held(run: RunFolder, recipe: ResolvedRecipe, tell: Callable[[float], None] = lambda share: None) -> None:
    """Evaluate as `evaluate` does, on the recipe's device and data folder; the caller must hold the run's lock."""
    engine = Engine(choose_device(recipe.device))
    with process_settings(engine.device, threads=recipe.threads):
        data = load_data(recipe, run.path / SPLIT).on(engine.device)
        network = load_network(run, data)
        # Until all new outputs are written, the run is not finished.
        (run.path / RESULTS).unlink(missing_ok=True)
        write_json(run.path / "cost.json", [row._asdict() for row in cost(network)])
        engine.place(network)
        results: dict[str, Any] = {}
        parts: tuple[Part, ...] = ("validation", "test")
        counts = {part: len(data.labels(part)) for part in parts}
        for part in parts:
            before = counts["validation"] if part == "test" else 0

            def progress(done: int, before: int = before) -> None:
                tell((before + done) / sum(counts.values()))

            outputs = collect_outputs(network, data, part, engine, augment_validation(recipe, part), progress)
            save_tensors(run.path / f"outputs-{part}.safetensors", outputs, run.name)
            hits = outputs["logits"].argmax(2) == outputs["labels"][:, None]
            results[part] = (100 * hits.double().mean(0)).tolist()
    if images := images_digest(recipe):
        results["images"] = images
    write_json(run.path / RESULTS, results)


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
) -> dict[str, Tensor]:
    """Return logits [N, K, C] of all exits, labels [N] and indices [N] (in the data set's order) of one part.

    `progress` is called with the number of images that are done.
    """
    network.eval()
    pieces = []
    count = len(data.labels(part))
    for batch in data.batches(part, torch.arange(count).split(_BATCH), augment=augment, seed=0):
        logits = torch.stack(network(engine.placement.images(batch.images)).logits, 1)
        pieces.append(logits.cpu())
        progress(sum(map(len, pieces)))
    dtype = torch.float32 if data.num_classes <= _FLOAT32_CLASSES else torch.float16
    return {
        "logits": torch.cat(pieces).to(dtype),
        "labels": data.labels(part),
        "indices": getattr(data.split, part),
    }


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
