"""Jobs: data, network, strategy and phases of a recipe. No other module builds these from a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exitkit import plugins
from exitkit.data.base import Data, DataSet, build_dataset
from exitkit.data.split import Split
from exitkit.data.thinning import thin
from exitkit.engine.devices import choose_device
from exitkit.engine.precision import AUTO, choose_precision
from exitkit.engine.randomness import derive
from exitkit.errors import UserError
from exitkit.files import load_tensors
from exitkit.networks.build import build_network
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.runs.folder import SPLIT, WEIGHTS, RunFolder
from exitkit.runs.recipe import Recipe, ResolvedRecipe
from exitkit.runs.weights import run_weights_digest, side_networks_digest, weights_digest
from exitkit.strategy.base import Phase, TrainingStrategy
from exitkit.strategy.composition import build_strategy


@dataclass(frozen=True)
class Job:
    """What a run trains: the recipe, the images, the network with its initial weights, and the phases.

    Attributes:
        recipe: the resolved recipe.
        data: the images, split.
        network: built from the recipe's seed; phases adapt it.
        strategy: the method.
        phases: the phases of training; at least one.
        first: index of the first phase to train: 1 if `init_from` replaces phase 0, else 0.
    """

    recipe: ResolvedRecipe
    data: Data
    network: MultiExitNetwork
    strategy: TrainingStrategy
    phases: list[Phase]

    @classmethod
    def make(cls, recipe: ResolvedRecipe, split: Path | None = None, data: Data | None = None) -> Job:
        """Make data, network, strategy and phases.

        Args:
            recipe: the resolved recipe.
            split: file of a stored split, for a run that has begun; by default the data set's own split is used.
            data: the images, if they are loaded already.

        Raises:
            UserError: images are missing, or a value is impossible.
        """
        data = load_data(recipe, split) if data is None else data
        network = make_network(recipe, data.input_shape, data.num_classes)
        strategy = make_strategy(recipe)
        return cls(recipe, data, network, strategy, make_phases(strategy, recipe.epochs, network.num_exits))

    @property
    def first(self) -> int:
        """Index of the first phase to train: 1 if `init_from` replaces phase 0, else 0."""
        return first_phase(self.recipe, len(self.phases))


def resolve(recipe: Recipe) -> ResolvedRecipe:
    """Return a recipe in which every value is set, from the data set's house recipe and the plugins' defaults.

    Raises:
        UserError: a name or field is unknown, a value is impossible, or an ingredient does not exist.
    """
    dataset = make_dataset(recipe)
    house = {key: value for key, value in dataset.house.items() if getattr(recipe, key) is None}
    filled = recipe.with_values(**house)
    backbone = plugins.configure("backbone", str(filled.backbone), recipe.backbone_settings)
    strategy = make_strategy(recipe)
    values = filled.model_dump() | {
        "method_settings": _plain(strategy.settings()),
        "backbone_settings": _plain({name: getattr(backbone, name) for name in plugins.fields(type(backbone))}),
        "dataset_settings": _plain({name: getattr(dataset, name) for name in plugins.fields(type(dataset))}),
        "ingredients": _digests(recipe, strategy),
    }
    if filled.precision == AUTO:
        values["precision"] = choose_precision(AUTO, choose_device(filled.device))
    if filled.schedule != "step":
        values["milestones"] = ()
    if recipe.init_from and not recipe.init_weights:
        values["init_weights"] = weights_digest(recipe.init_from)
    return ResolvedRecipe.make(**values)


def _digests(recipe: Recipe, strategy: TrainingStrategy) -> dict[str, str]:
    """Return {folder: digest} of the runs that a method reads; digests that the recipe already has are kept.

    A teacher that is a method has no digest, since the recipe determines its run.
    """
    sources: dict[str, Callable[[str], str]] = {
        name: run_weights_digest for name in strategy.teacher_runs() if is_folder(name)
    }
    sources |= dict.fromkeys(strategy.ingredients(), side_networks_digest)
    return {name: recipe.ingredients.get(name) or digest(name) for name, digest in sources.items()}


def is_folder(name: str) -> bool:
    """Whether the name of a teacher is the folder of a run instead of a method."""
    return (Path(name) / "recipe.json").is_file() or len(Path(name).parts) > 1


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON stores them, so that a recipe read from a file equals the one that was written."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return plain


def make_dataset(recipe: Recipe) -> DataSet:
    """Return a recipe's data set; its images are not loaded."""
    return build_dataset(recipe.dataset, recipe.dataset_settings)


def make_strategy(recipe: Recipe) -> TrainingStrategy:
    """Return a recipe's method."""
    return build_strategy(recipe.method, **recipe.method_settings)


def make_phases(strategy: TrainingStrategy, epochs: int, exits: int) -> list[Phase]:
    """Return a strategy's phases.

    Raises:
        UserError: the method did not return a list of phases.
    """
    phases = strategy.phases(epochs, exits)
    name = type(strategy).__name__
    if not isinstance(phases, list | tuple) or not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise UserError(f"phases of {name} returned {phases!r}; expected a list of at least one Phase")
    return list(phases)


def first_phase(recipe: Recipe, phases: int) -> int:
    """Return the index of the first phase to train: 1 if another run's weights replace phase 0, else 0."""
    return 1 if recipe.init_from and phases > 1 else 0


def load_data(recipe: Recipe, split: Path | None = None) -> Data:
    """Load a recipe's images, with the split of the file `split`, or by default the data set's own.

    Raises:
        UserError: images are missing or damaged, or the split is of other images.
    """
    dataset = make_dataset(recipe)
    loaded = dataset.load(Path(recipe.data_dir) if recipe.data_dir is not None else None, recipe.download)
    data = thin(loaded, dataset.per_class, dataset.imbalance)
    if split is None:
        return data
    try:
        return data.with_split(Split.load(split))
    except UserError as error:
        raise error if str(split) in str(error) else UserError(f"{split}: {error}") from None


def images_digest(recipe: Recipe) -> str | None:
    """Return a digest of a recipe's images for data sets that are defined by the files in a folder, else None."""
    return None if recipe.data_dir is None else make_dataset(recipe).digest(Path(recipe.data_dir))


def check_images(run: RunFolder, recipe: Recipe) -> None:
    """Check that a run was evaluated on the images that are now in the recipe's folder.

    Raises:
        UserError: it was evaluated on other images.
    """
    try:
        evaluated = run.results().get("images")
    except UserError:
        return  # a new evaluation will replace missing or damaged results
    if evaluated is not None and images_digest(recipe) not in (None, evaluated):
        raise UserError(
            f"run {run.path} was evaluated on other images than those in {recipe.data_dir} now; "
            "give their folder by --data-dir DIR"
        )


def load_run_data(run: RunFolder | str | Path, data_dir: str | None = None) -> Data:
    """Load the images of a run as it split them (`exitkit.load_data`).

    Args:
        run: the run, or its folder.
        data_dir: folder of the images; by default that of the recipe.

    Raises:
        UserError: the images are missing, or differ from those of the run's results.
    """
    run = RunFolder.of(run)
    recipe = run.recipe if data_dir is None else run.recipe.with_values(data_dir=data_dir)
    check_images(run, recipe)
    return load_data(recipe, run.path / SPLIT)


def make_network(recipe: ResolvedRecipe, input_shape: tuple[int, int, int], num_classes: int) -> MultiExitNetwork:
    """Build a recipe's network with the initial weights of its seed, not yet adapted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(recipe.seed, "weights"))
        settings = recipe.backbone_settings
        return build_network(recipe.backbone, num_classes=num_classes, input_shape=input_shape, **settings)


def count_exits(recipe: ResolvedRecipe) -> int:
    """Return the number of exits of a recipe's network, without loading images or allocating weights."""
    with torch.device("meta"):
        return build_network(recipe.backbone, **recipe.backbone_settings).num_exits


def load_network(run: RunFolder | str | Path, data: Data | None = None) -> MultiExitNetwork:
    """Return a run's trained network, adapted by all its phases, in evaluation mode (`exitkit.load_network`).

    Args:
        run: the run, or its folder.
        data: the run's images, if they are loaded; needed, and loaded by default, only for runs of earlier releases.

    Raises:
        UserError: the weights are missing, damaged or of another network.
    """
    run = RunFolder.of(run)
    recipe, about = run.recipe, run.environment()
    if data is None and "input_shape" in about:
        shape, classes = tuple(about["input_shape"]), about["num_classes"]
    else:
        data = load_run_data(run) if data is None else data
        shape, classes = data.input_shape, data.num_classes
    network = make_network(recipe, shape, classes)
    adapt(network, make_strategy(recipe), recipe.epochs)
    path = run.own(WEIGHTS)
    tensors = load_tensors(path)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} is of another network than the recipe: {reason}") from None
    for name, tensor in network.state_dict().items():
        if tensors[name].dtype != tensor.dtype or not tensor.isfinite().all():
            raise UserError(f"{path} is damaged: {name} is not finite, or of another type")
    return network.eval()


def adapt(network: MultiExitNetwork, strategy: TrainingStrategy, epochs: int = 1) -> None:
    """Apply the adaptations of all of a strategy's phases to a network."""
    with torch.random.fork_rng(devices=[]):  # a link may draw its initial weights
        for phase in make_phases(strategy, epochs, network.num_exits):
            phase.strategy.adapt(network)
