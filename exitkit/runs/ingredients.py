"""Ingredients of a run that come from other runs: initial weights, teachers and frozen side networks.

They are resolved once (`exitkit.runs.job.resolve`), their digests are part of the run's identity, and they are checked
when they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from exitkit.data.base import Data
from exitkit.data.inventory import Inventory
from exitkit.data.split import Split
from exitkit.errors import UserError
from exitkit.files import exists
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.released.weights import check_finite, own_tensors, read_released_file
from exitkit.plugins import method_parts
from exitkit.runs.folder import IMAGES, SPLIT, RunFolder
from exitkit.runs.job import image_root, images_digest, is_folder, load_network, make_strategy, resolve
from exitkit.runs.recipe import ResolvedRecipe
from exitkit.runs.weights import (
    check_unchanged,
    run_weights_digest,
    side_network,
    side_networks_digest,
    weights_digest,
    weights_file,
)


def load_initial(recipe: ResolvedRecipe, network: MultiExitNetwork) -> None:
    """Load the recipe's initial weights (`init_from`) into the network, if it has any.

    Raises:
        UserError: the weights are missing, have changed since the recipe was resolved, are of another network, or are
            not finite.
    """
    if recipe.init_from is None:
        return
    check_unchanged(recipe.init_from, weights_digest(recipe.init_from), recipe.init_weights)
    path = weights_file(recipe.init_from)
    tensors = own_tensors(network, read_released_file(path))
    # Without the calibration of that run: training changes what it was fitted to.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".temperature")}
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"init_from: {path} is of another network than this run's ({reason})") from None
    check_finite(network, f"init_from ({path})")


def check_unseen(folder: Path, recipe: ResolvedRecipe, data: Data) -> None:
    """Check that a run was not trained on the validation images of the run that uses it.

    Images of other folders are taken for other images, and those of a folder that has changed are known by their names.

    Args:
        folder: folder of the run.
        recipe: recipe of the run that uses it.
        data: images of the run that uses it.

    Raises:
        UserError: it was trained on some of them.
    """
    run = RunFolder(folder)
    if run.recipe.dataset != recipe.dataset:
        return
    trained, validation = Split.load(run.path / SPLIT).train, data.split.validation
    now, then = images_digest(recipe), run.environment().get("images")
    if None in (now, then) or now == then:
        overlap = int(torch.isin(validation, trained).sum())
    else:
        overlap = _files_in_common(run, trained, recipe, data)
    if overlap:
        raise UserError(
            f"{folder} was trained on {overlap} of the {len(data.split.validation)} validation images of this run; "
            "expected a run with the same validation images"
        )


def _files_in_common(run: RunFolder, trained: Tensor, recipe: ResolvedRecipe, data: Data) -> int:
    """Return how many validation files a run was trained on; 0 if it has other images, from another folder."""
    root, before = image_root(recipe), image_root(run.recipe)
    if root is None or before is None or root.resolve() != before.resolve() or not exists(run.path / IMAGES):
        return 0
    now = data.inventory(root)
    if now is None:
        return 0
    known = Inventory.read(run.path / IMAGES).train_files
    seen = {known[index] for index in trained.tolist()}
    return sum(now.train_files[index] in seen for index in data.split.validation.tolist())


def teacher_recipes(recipe: ResolvedRecipe) -> dict[str, ResolvedRecipe]:
    """Return {name: recipe} of the teachers that are methods: this recipe, with the method and its default settings.

    Raises:
        UserError: a teacher is neither a method nor the folder of a run, or needs a teacher itself.
    """
    recipes = {}
    for name in make_strategy(recipe).teacher_runs():
        if is_folder(name):
            continue
        try:
            method_parts(name)
        except UserError as error:
            raise UserError(f"teacher: {error}; expected a method, or the folder of a finished run") from None
        plain = recipe.with_values(method=name, method_settings={}, init_from=None, init_weights=None, ingredients={})
        recipes[name] = resolve(plain)
        if make_strategy(recipes[name]).teacher_runs():
            raise UserError(f"teacher {name} needs a teacher itself; expected a method that does not")
    return recipes


def load_teachers(recipe: ResolvedRecipe, out: Path, data: Data) -> dict[str, MultiExitNetwork]:
    """Return the trained networks of a recipe's teachers by name, in evaluation mode.

    Args:
        recipe: recipe of the run that is trained.
        out: folder of the runs of teachers that are methods.
        data: images of the run that is trained.

    Raises:
        UserError: a teacher is unfinished, has changed, has other classes or images of another size, or was trained on
            validation images.
    """
    by_method = teacher_recipes(recipe)
    networks = {}
    for name in make_strategy(recipe).teacher_runs():
        folder = RunFolder(out / by_method[name].id if name in by_method else name)
        folder.results()  # the error for an unfinished run explains how to resume it
        if name not in by_method:
            check_unchanged(name, run_weights_digest(name), recipe.ingredients.get(name))
        check_unseen(folder.path, recipe, data)
        teacher = load_network(folder, data).requires_grad_(False)
        if teacher.num_classes != data.num_classes:
            raise UserError(f"teacher {name} has {teacher.num_classes} classes; expected {data.num_classes}")
        if teacher.input_shape != data.input_shape:
            raise UserError(
                f"teacher {name} reads images of {_shape(teacher.input_shape)}; expected those of this run, "
                f"{_shape(data.input_shape)}"
            )
        networks[name] = teacher
    return networks


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def load_side_network(recipe: ResolvedRecipe, source: str, name: str) -> Mapping[str, Tensor]:
    """Return the tensors of a side network of another run, one of the recipe's ingredients.

    Raises:
        UserError: it is missing, or has changed since the recipe was resolved.
    """
    check_unchanged(source, side_networks_digest(source), recipe.ingredients.get(source))
    return side_network(source, name)
