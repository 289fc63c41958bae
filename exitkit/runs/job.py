"""A job: a recipe made real, once. Nothing else builds a data set, a network or a strategy from a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exitkit import plugins
from exitkit.data.base import Data, DataSet, build_dataset
from exitkit.data.split import Split
from exitkit.data.thinning import thin
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
        phases: what is trained when; at least one.
        first: the number of the phase that training begins with: the second where `init_from` replaces the first.
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
            split: a stored split, for a run that has begun; by default the data set's own.
            data: the images, where they are loaded already.

        Raises:
            UserError: images are missing, or any value is impossible.
        """
        data = load_data(recipe, split) if data is None else data
        network = make_network(recipe, data.input_shape, data.num_classes)
        strategy = make_strategy(recipe)
        return cls(recipe, data, network, strategy, make_phases(strategy, recipe.epochs, network.num_exits))

    @property
    def first(self) -> int:
        """See the class."""
        return first_phase(self.recipe, len(self.phases))


def resolve(recipe: Recipe) -> ResolvedRecipe:
    """Return a recipe in which every value is set: by the data set's house recipe, and every plugin's defaults.

    Raises:
        UserError: unknown names or fields, values that are impossible, or an ingredient that is not there.
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
    if filled.schedule != "step":
        values["milestones"] = ()
    if recipe.init_from and not recipe.init_weights:
        values["init_weights"] = weights_digest(recipe.init_from)
    return ResolvedRecipe.make(**values)


def _digests(recipe: Recipe, strategy: TrainingStrategy) -> dict[str, str]:
    """Return {folder: digest} of the runs that a method reads; digests that the recipe holds already are kept.

    A teacher named by a method has none: its run follows from the recipe itself.
    """
    sources = {name: run_weights_digest for name in strategy.teachers() if is_folder(name)}
    sources |= dict.fromkeys(strategy.ingredients(), side_networks_digest)
    return {name: recipe.ingredients.get(name) or digest(name) for name, digest in sources.items()}


def is_folder(name: str) -> bool:
    """Whether the name of a teacher means the folder of a run, not a method."""
    return (Path(name) / "recipe.json").is_file() or len(Path(name).parts) > 1


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them, so that a recipe read back is equal to the one written."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return plain


def make_dataset(recipe: Recipe) -> DataSet:
    """Return the description of a recipe's data set."""
    return build_dataset(recipe.dataset, recipe.dataset_settings)


def make_strategy(recipe: Recipe) -> TrainingStrategy:
    """Return a recipe's method."""
    return build_strategy(recipe.method, **recipe.method_settings)


def make_phases(strategy: TrainingStrategy, epochs: int, exits: int) -> list[Phase]:
    """Return a strategy's phases.

    Raises:
        UserError: what the method returned are no phases.
    """
    phases = strategy.phases(epochs, exits)
    name = type(strategy).__name__
    if not isinstance(phases, list | tuple) or not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise UserError(f"phases of {name} returned {phases!r}; expected a list of at least one Phase")
    return list(phases)


def first_phase(recipe: Recipe, phases: int) -> int:
    """Return the number of the phase that training begins with: the second where the first is another run's."""
    return 1 if recipe.init_from and phases > 1 else 0


def load_data(recipe: Recipe, split: Path | None = None) -> Data:
    """Load a recipe's images, with the split stored at `split` or else the data set's own.

    Raises:
        UserError: images are missing or damaged, or the split is of others.
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
    """Return a digest of a recipe's images, for data sets that are whatever their folder holds; else None."""
    return None if recipe.data_dir is None else make_dataset(recipe).digest(Path(recipe.data_dir))


def check_images(run: RunFolder, recipe: Recipe) -> None:
    """Check that the images of a run's results are those in the recipe's folder now.

    Raises:
        UserError: they are others.
    """
    try:
        evaluated = run.results().get("images")
    except UserError:
        return  # there are none, or damaged ones, which a new evaluation replaces
    if evaluated is not None and images_digest(recipe) not in (None, evaluated):
        raise UserError(
            f"run {run.path} was evaluated on other images than those in {recipe.data_dir} now; "
            "give their folder by --data-dir DIR"
        )


def load_run_data(run: RunFolder | str | Path, data_dir: str | None = None) -> Data:
    """Load the images of a run as it split them (`exitkit.load_data`).

    Args:
        run: the run, or its folder.
        data_dir: the folder of the images now, if it is not the one that the run was trained from.

    Raises:
        UserError: they are missing, or others than those of the run's results.
    """
    run = RunFolder.of(run)
    recipe = run.recipe if data_dir is None else run.recipe.with_values(data_dir=data_dir)
    check_images(run, recipe)
    return load_data(recipe, run.path / SPLIT)


def make_network(recipe: ResolvedRecipe, input_shape: tuple[int, int, int], num_classes: int) -> MultiExitNetwork:
    """Build a recipe's network with the weights that its seed gives, not yet adapted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(recipe.seed, "weights"))
        settings = recipe.backbone_settings
        return build_network(recipe.backbone, num_classes=num_classes, input_shape=input_shape, **settings)


def count_exits(recipe: ResolvedRecipe) -> int:
    """Return the number of exits of a recipe's network; neither images nor memory for the weights are needed."""
    with torch.device("meta"):
        return build_network(recipe.backbone, **recipe.backbone_settings).num_exits


def load_network(run: RunFolder | str | Path, data: Data | None = None) -> MultiExitNetwork:
    """Return a run's trained network, adapted by all its phases, in evaluation mode (`exitkit.load_network`).

    Args:
        run: the run, or its folder.
        data: the run's images, if they are loaded; only runs of earlier releases need them, and load them then.

    Raises:
        UserError: weights that are missing, damaged or of another network.
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
        raise UserError(f"{path} holds another network than its recipe: {reason}") from None
    for name, tensor in network.state_dict().items():
        if tensors[name].dtype != tensor.dtype or not tensor.isfinite().all():
            raise UserError(f"{path} is damaged: {name} is not finite, or of another type")
    return network.eval()


def adapt(network: MultiExitNetwork, strategy: TrainingStrategy, epochs: int = 1) -> None:
    """Apply the adaptations of all of a strategy's phases to a network."""
    with torch.random.fork_rng(devices=[]):  # a link may draw its initial weights
        for phase in make_phases(strategy, epochs, network.num_exits):
            phase.strategy.adapt(network)
