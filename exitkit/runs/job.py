"""Jobs: data, network, strategy and phases of a recipe. No other module builds these from a recipe."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exitkit import plugins
from exitkit.data.base import Data, DataSet, Part, build_dataset
from exitkit.data.inventory import Inventory
from exitkit.data.sharing import shared
from exitkit.data.split import Split
from exitkit.data.thinning import thin
from exitkit.engine.devices import choose_device
from exitkit.engine.precision import AUTO, choose_precision
from exitkit.engine.randomness import derive
from exitkit.errors import Note, UserError
from exitkit.files import exists, load_tensors
from exitkit.networks.build import build_backbone, make_backbone
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.families.base import Backbone
from exitkit.runs.folder import IMAGES, SPLIT, WEIGHTS, RunFolder
from exitkit.runs.formats import left_out
from exitkit.runs.recipe import Recipe, ResolvedRecipe
from exitkit.runs.weights import (
    check_unchanged,
    published_weights_digest,
    run_weights_digest,
    side_networks_digest,
    weights_digest,
)
from exitkit.strategy.base import Phase, TrainingStrategy
from exitkit.strategy.composition import Composition, configure_strategy


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
        """Index of the first phase to train, see `first_phase`."""
        return first_phase(self.recipe, self.phases)


def resolve(recipe: Recipe) -> ResolvedRecipe:
    """Return a recipe in which every value is set, from the data set's default recipe and the plugins' defaults.

    Raises:
        UserError: a name or field is unknown, a value is impossible, or an ingredient does not exist.
    """
    dataset = make_dataset(recipe)
    house = {key: value for key, value in _house(dataset).items() if getattr(recipe, key) is None}
    filled = recipe.with_values(**house)
    backbone = make_backbone(str(filled.backbone), recipe.backbone_settings)
    dataset = dataset.suited(backbone.preprocessing())
    strategy = make_strategy(recipe)
    values = filled.model_dump() | {
        "method_settings": _plain(strategy.settings()),
        "backbone_settings": _plain({name: getattr(backbone, name) for name in plugins.fields(type(backbone))}),
        "dataset_settings": _plain({name: getattr(dataset, name) for name in plugins.fields(type(dataset))}),
        "ingredients": _digests(recipe, strategy, backbone),
    }
    if filled.precision == AUTO:
        values["precision"] = choose_precision(AUTO, choose_device(filled.device))
    if filled.schedule != "step":
        values["milestones"] = ()
    if recipe.init_from and not recipe.init_weights:
        values["init_weights"] = weights_digest(recipe.init_from)
    return ResolvedRecipe.make(**values)


def _house(dataset: DataSet) -> dict[str, Any]:
    """Return a data set's default recipe; what it leaves open is that of the base class."""
    return DataSet.house | dataset.house


def without_effect(recipe: Recipe) -> dict[str, str]:
    """Return {key: what it needs} of the values of a recipe that have no effect beside the others.

    The keys are those of the recipe, and fields of the method, of a composition as `part.field`.
    """
    schedule = recipe.schedule or _house(make_dataset(recipe))["schedule"]
    unused = {} if schedule == "step" else dict.fromkeys(("milestones", "decay"), "schedule=step")
    return unused | make_strategy(recipe).unused_settings()


def check_effects(recipe: Recipe) -> None:
    """Check, before a new run, that what its recipe changes has an effect; a key at its default may have none.

    Raises:
        UserError: a value has no effect, or the schedule `step` has no milestones.
    """
    strategy = make_strategy(recipe)
    parts = strategy.parts if isinstance(strategy, Composition) else {recipe.method: strategy}
    for key, needed in without_effect(recipe).items():
        if key in Recipe.model_fields:
            # A schedule of the recipe's own may override that of a file, and the milestones remain.
            changed = recipe.schedule is None and getattr(recipe, key) not in (None, Recipe.model_fields[key].default)
        else:
            name, _, field = key.rpartition(".")
            part = parts[name or recipe.method]
            usual = plugins.defaults(plugins.load("method", name or recipe.method))[field]
            choices = plugins.fields(type(part))[field].metadata.get("variant")
            default = choices[getattr(part, "variant")] if usual is None and choices else usual  # noqa: B009
            changed = getattr(part, field) != default
        if changed:
            raise UserError(f"{key} has no effect without {needed}; leave it out")
    house = _house(make_dataset(recipe))
    schedule, milestones = (getattr(recipe, key) or house[key] for key in ("schedule", "milestones"))
    if schedule == "step" and not milestones:
        raise UserError("schedule=step has no milestones; expected shares of the epochs, such as milestones=0.5,0.75")


def _digests(recipe: Recipe, strategy: TrainingStrategy, backbone: Backbone) -> dict[str, str]:
    """Return {path: digest} of the runs that a method reads, and of the files that hold a network's initial weights.

    Digests that the recipe already has are kept.

    A teacher that is a method has no digest, since the recipe determines its run.
    """
    sources: dict[str, Callable[[str], str]] = {
        name: run_weights_digest for name in strategy.teacher_runs() if is_folder(name)
    }
    sources |= dict.fromkeys(strategy.ingredients(), side_networks_digest)
    sources |= dict.fromkeys(backbone.weights_files(), published_weights_digest)
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
    return configure_strategy(recipe.method, recipe.method_settings)


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


def first_phase(recipe: Recipe, phases: Sequence[Phase]) -> int:
    """Return the index of the first phase to train: 1 if the weights of `init_from` replace phase 0, else 0.

    They replace a phase that trains all stages, and not, for example, the first branch alone.
    """
    trains = phases[0].train
    whole = trains == "all" or (isinstance(trains, tuple) and "stages." in trains)
    return 1 if recipe.init_from and len(phases) > 1 and whole else 0


def load_data(recipe: Recipe, split: Path | None = None) -> Data:
    """Load a recipe's images, with the split of the file `split`, or by default the data set's own.

    Raises:
        UserError: images are missing or damaged, or the split is of other images.
    """
    dataset, data_dir = make_dataset(recipe), data_folder(recipe)
    loaded = shared(lambda: dataset.load(data_dir, recipe.download), f"{recipe.dataset} {dataset!r} {data_dir}")
    data = thin(loaded, dataset.per_class, dataset.imbalance, bool(dataset.thin_validation))
    if split is None:
        return data
    table, root = split.with_name(IMAGES), dataset.root(data_dir)
    if root is not None and exists(table) and (now := data.inventory(root)):
        Inventory.read(table).check_listing(now, f"run {split.parent}")
    try:
        return data.with_split(Split.load(split))
    except UserError as error:
        raise error if str(split) in str(error) else UserError(f"{split}: {error}") from None


def images_digest(recipe: Recipe) -> str | None:
    """Return a digest of a recipe's images for data sets that are defined by the user's files or objects, else None."""
    return make_dataset(recipe).digest(data_folder(recipe))


def data_folder(recipe: Recipe) -> Path | None:
    """Return a recipe's folder of images."""
    return None if recipe.data_dir is None else Path(recipe.data_dir)


def image_root(recipe: Recipe) -> Path | None:
    """Return the folder that the names of a recipe's image files are relative to, if it is known."""
    return make_dataset(recipe).root(data_folder(recipe))


def load_run_data(run: RunFolder | str | Path, data_dir: str | None = None) -> Data:
    """Load the images of a run as it split them (`exitkit.load_data`).

    Validation and test images whose file is missing or damaged are left out, with a `Note`.

    Args:
        run: the run, or its folder.
        data_dir: folder of the images; by default that of the recipe.

    Raises:
        UserError: the images are missing, or differ from those of the run's results.
    """
    run = RunFolder.of(run)
    data, messages = load_evaluated(run, data_dir)
    for part, texts in messages.items():
        warnings.warn(Note(f"{run.path.name}: {left_out(part, texts)}"), stacklevel=2)
    return data


def load_evaluated(
    run: RunFolder, data_dir: str | None = None, strict: bool = True
) -> tuple[Data, dict[Part, list[str]]]:
    """Load the images that a run is evaluated on, and {part: messages} about those that are left out.

    Args:
        run: the run.
        data_dir: folder of the images; by default that of the recipe.
        strict: whether other images in the place of the run's are an error, or are left out.

    Raises:
        UserError: the images are missing, or differ from those of the run's results.
    """
    recipe = run.recipe if data_dir is None else run.recipe.with_values(data_dir=data_dir)
    root = image_root(recipe)
    if root is None or not exists(run.path / IMAGES):  # not files, or a run of an earlier release
        if strict:
            _check_digest(run, recipe)
        return load_data(recipe, run.path / SPLIT), {}
    inventory = Inventory.read(run.path / IMAGES)
    unreadable, replaced = inventory.compare(root)
    if len(unreadable) == len(inventory.facts):
        raise UserError(
            f"{root} has none of the {len(unreadable)} validation and test images of run {run.path}; give their folder "
            "by --data-dir DIR"
        )
    if replaced and strict:
        raise UserError(
            f"run {run.path} was evaluated on other images than those in {root} now (such as {replaced[0]}); give "
            "their folder by --data-dir DIR"
        )
    names = run.environment().get("class_names", [])
    data = make_dataset(recipe).restore(inventory, root, names, Split.load(run.path / SPLIT))
    return _without(data, inventory, unreadable | {name: f"image {root / name} was replaced" for name in replaced})


def _without(data: Data, inventory: Inventory, faults: Mapping[str, str]) -> tuple[Data, dict[Part, list[str]]]:
    """Return the data without some files of its validation and test parts, and {part: messages}."""
    dropped: dict[Part, set[int]] = {"validation": set(), "test": set()}
    messages: dict[Part, list[str]] = {}
    lists: dict[Part, list[str]] = {"validation": inventory.train_files, "test": inventory.test_files}
    for part, files in lists.items():
        for index in getattr(data.split, part).tolist() if faults else ():
            if files[index] in faults:
                dropped[part].add(index)
                messages.setdefault(part, []).append(faults[files[index]])
        if len(dropped[part]) == len(getattr(data.split, part)):
            raise UserError(f"no {part} image can be read: {messages[part][0]}")
    return replace(data, split=data.split.without(dropped["validation"], dropped["test"])), messages


def _check_digest(run: RunFolder, recipe: Recipe) -> None:
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
            f"run {run.path} was evaluated on other images than those {recipe.place_of_images} now; "
            "give their folder by --data-dir DIR"
        )


def make_network(
    recipe: ResolvedRecipe, input_shape: tuple[int, int, int], num_classes: int, *, weights: bool = True
) -> MultiExitNetwork:
    """Build a recipe's network with its initial weights, not yet adapted.

    Args:
        recipe: the resolved recipe, whose seed the weights follow.
        input_shape: (channels, height, width) of the images.
        num_classes: width of the logits.
        weights: whether to read the files of weights that the backbone names; else all weights are random.

    Raises:
        UserError: the weights can't be read, or have changed since the recipe was resolved.
    """
    backbone = make_backbone(recipe.backbone, recipe.backbone_settings)
    if not weights:
        backbone = backbone.without_weights()
    for source in backbone.weights_files():
        check_unchanged(source, published_weights_digest(source), recipe.ingredients.get(source))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(recipe.seed, "weights"))
        return build_backbone(backbone, recipe.backbone, num_classes, input_shape)


def count_exits(recipe: ResolvedRecipe) -> int:
    """Return the number of exits of a recipe's network, without loading images or allocating weights."""
    backbone = make_backbone(recipe.backbone, recipe.backbone_settings)
    with torch.device("meta"):
        return build_backbone(backbone.without_weights(), recipe.backbone, None, None).num_exits


def load_network(run: RunFolder | str | Path, data: Data | None = None) -> MultiExitNetwork:
    """Return a run's trained network, adapted by all its phases, in evaluation mode (`exitkit.load_network`).

    Args:
        run: the run, or its folder.
        data: images of the run's size and classes, if they are loaded; used, and loaded by default, only for runs of
            earlier releases.

    Raises:
        UserError: the weights are missing, damaged or of another network.
    """
    run = RunFolder.of(run)
    recipe, about = run.recipe, run.environment()
    if "input_shape" in about:
        shape, classes = tuple(about["input_shape"]), about["num_classes"]
    else:
        data = load_run_data(run) if data is None else data
        shape, classes = data.input_shape, data.num_classes
    network = make_network(recipe, shape, classes, weights=False)
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
