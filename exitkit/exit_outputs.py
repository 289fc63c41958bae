"""Run a trained network over validation and test images, and keep what every exit said of every image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from exitkit.build import build_dataset, build_network, build_strategy
from exitkit.costs import cost
from exitkit.data.base import Split
from exitkit.data.thinning import thin
from exitkit.engine import Engine, choose_device
from exitkit.errors import UserError
from exitkit.files import load_tensors, save_tensors, write_json
from exitkit.network import MultiExitNetwork
from exitkit.randomness import derive
from exitkit.runs import RESULTS, SPLIT, WEIGHTS, RunFolder, table_of
from exitkit.sameness import check_images, images_digest
from exitkit.strategy import at_least_float32

if TYPE_CHECKING:
    import pandas as pd

    from exitkit.data.base import Data, Part
    from exitkit.recipe import Recipe

_BATCH = 256
# Up to here logits are kept in float32; with more classes (ImageNet) in float16, or a run would be gigabytes.
_FLOAT32_CLASSES = 200


def load_data(recipe: Recipe, split: Path | None = None) -> Data:
    """Load a recipe's images, with the split stored at `split` or else the data set's own."""
    dataset = build_dataset(recipe.dataset, recipe.dataset_settings)
    loaded = dataset.load(Path(recipe.data_dir) if recipe.data_dir is not None else None, recipe.download)
    data = thin(loaded, dataset.per_class, dataset.imbalance)
    if split is None:
        return data
    try:
        return data.with_split(Split.load(split))
    except UserError as error:
        raise error if str(split) in str(error) else UserError(f"{split}: {error}") from None


def load_run_data(run: RunFolder, data_dir: str | None = None) -> Data:
    """Load the images of a run as it split them, from another folder if they lie there now.

    Raises:
        UserError: they are missing, or others than those of the run's results.
    """
    recipe = run.recipe if data_dir is None else run.recipe.with_values(data_dir=data_dir)
    check_images(run, recipe)
    return load_data(recipe, run.path / SPLIT)


def make_network(recipe: Recipe, input_shape: tuple[int, int, int], num_classes: int) -> MultiExitNetwork:
    """Build a recipe's network with the weights that its seed gives, not yet adapted."""
    assert recipe.backbone is not None
    torch.manual_seed(derive(recipe.seed, "weights"))
    return build_network(recipe.backbone, num_classes=num_classes, input_shape=input_shape, **recipe.backbone_settings)


def load_network(run: RunFolder, data: Data) -> MultiExitNetwork:
    """Return a run's trained network, adapted as its phases did, in evaluation mode.

    Raises:
        UserError: weights that are missing, damaged or of another network.
    """
    recipe = run.recipe
    network = make_network(recipe, data.input_shape, data.num_classes)
    assert recipe.epochs is not None
    strategy = build_strategy(recipe.method, **recipe.method_settings)
    for phase in strategy.phases(recipe.epochs, network.num_exits):
        phase.strategy.adapt(network)
    path = run.own(WEIGHTS)
    tensors = load_tensors(path)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{path} holds another network than its recipe: {str(error).splitlines()[-1].strip()}"
        ) from None
    for name, tensor in network.state_dict().items():
        if tensors[name].dtype != tensor.dtype or not tensor.isfinite().all():
            raise UserError(f"{path} is damaged: {name} is not finite, or of another type")
    return network.eval()


def evaluate(
    run: RunFolder | str | Path,
    *,
    device: str | None = None,
    data_dir: str | None = None,
    tell: Callable[[float], None] = lambda share: None,
) -> pd.DataFrame:
    """Evaluate a trained run (in fp32) and write its outputs, costs and results into its folder.

    Args:
        run: a run folder whose training is done.
        device: where to run; by default where the run was trained.
        data_dir: where the images lie now, if elsewhere than they did.
        tell: called with the share of the images, 0..1, that is done.

    Returns:
        one row an exit: exit, papers, macs, params, accuracy and validation_accuracy (percent), and what run it is.

    Raises:
        UserError: no such run, or one whose weights or images are missing, or other images than it was evaluated on.
    """
    run = run if isinstance(run, RunFolder) else RunFolder(run)
    given = {"device": device, "data_dir": data_dir}
    with run.held():
        recipe = run.recipe.with_values(**{key: value for key, value in given.items() if value is not None})
        check_images(run, recipe)
        evaluate_held(run, recipe, tell)
    return table_of([run])


def evaluate_held(run: RunFolder, recipe: Recipe, tell: Callable[[float], None] = lambda share: None) -> None:
    """Do what `evaluate` does for whoever holds the run already; where it happens is as the recipe says now."""
    torch.set_num_threads(recipe.threads)
    engine = Engine(choose_device(recipe.device))
    engine.set_arithmetic()
    data = load_data(recipe, run.path / SPLIT).on(engine.device)
    network = load_network(run, data)
    # While the new outputs appear one by one, the run is not finished.
    (run.path / RESULTS).unlink(missing_ok=True)
    write_json(run.path / "cost.json", [row._asdict() for row in cost(network)])
    engine.place(network)
    results: dict[str, Any] = {}
    parts: tuple[Part, ...] = ("validation", "test")
    counts = {part: len(data.labels(part)) for part in parts}
    for part in parts:
        before = counts["validation"] if part == "test" else 0

        def told(done: int, before: int = before) -> None:
            tell((before + done) / sum(counts.values()))

        outputs = collect_outputs(network, data, part, engine, augment_validation(recipe, part), told)
        save_tensors(run.path / f"outputs-{part}.safetensors", outputs, run.name)
        hits = outputs["logits"].argmax(2) == outputs["labels"][:, None]
        results[part] = (100 * hits.double().mean(0)).tolist()
    if images := images_digest(recipe):
        results["images"] = images
    write_json(run.path / RESULTS, results)


def augment_validation(recipe: Recipe, part: Part) -> bool:
    """Whether a part is read through the training augmentation: the papers' habit for validation, as an option."""
    return part == "validation" and recipe.dataset_settings.get("val_transform") == "train"


@torch.inference_mode()
def collect_outputs(
    network: MultiExitNetwork,
    data: Data,
    part: Part,
    engine: Engine,
    augment: bool = False,
    told: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """Return logits [N, K, C] of all exits, labels [N] and indices [N] (in the data set's order) of one part.

    `told` is called with the number of images that are done.
    """
    network.eval()
    pieces = []
    count = len(data.labels(part))
    for batch in data.batches(part, torch.arange(count).split(_BATCH), augment=augment, seed=0):
        logits = torch.stack(network(engine.images(batch.images)).logits, 1)
        pieces.append(logits.cpu())
        told(sum(map(len, pieces)))
    dtype = torch.float32 if data.num_classes <= _FLOAT32_CLASSES else torch.float16
    return {
        "logits": torch.cat(pieces).to(dtype),
        "labels": data.labels(part),
        "indices": getattr(data.split, part),
    }


@torch.inference_mode()
def measure(network: MultiExitNetwork, data: Data, part: Part, engine: Engine, augment: bool = False) -> Tensor:
    """Return sums of losses and hits [2, K] and the count as one vector [2K + 1], over the ranks' shares of a part."""
    network.eval()
    mine = torch.arange(engine.rank, len(data.labels(part)), engine.world)
    sums = torch.zeros(2, network.num_exits, dtype=torch.float64)
    positions = mine.split(_BATCH) if len(mine) else ()  # more ranks than images
    for batch in data.batches(part, positions, augment=augment, seed=0):
        labels = engine.labels(batch.labels)
        with engine.autocast():
            logits = network(engine.images(batch.images)).logits
        losses = torch.stack([F.cross_entropy(at_least_float32(output), labels, reduction="sum") for output in logits])
        hits = torch.stack([(output.argmax(1) == labels).sum() for output in logits])
        sums += torch.stack([losses.cpu().double(), hits.cpu().double()])
    return torch.cat([sums.flatten(), torch.tensor([float(len(mine))], dtype=torch.float64)])
