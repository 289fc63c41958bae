"""Ingredients: what a run takes from other runs, namely initial weights, teachers and frozen side networks.

Each is resolved once (`exitkit.runs.job.resolve`), with a digest in the run's identity, and checked when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from exitkit.data.base import Data
from exitkit.data.split import Split
from exitkit.errors import UserError
from exitkit.files import load_tensors
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.plugins import method_parts
from exitkit.runs.folder import SPLIT, RunFolder
from exitkit.runs.job import is_folder, load_network, make_strategy, resolve
from exitkit.runs.recipe import ResolvedRecipe
from exitkit.runs.weights import (
    run_weights_digest,
    side_network,
    side_networks_digest,
    weights_digest,
    weights_file,
)


def load_initial(recipe: ResolvedRecipe, network: MultiExitNetwork) -> None:
    """Give the network the weights that the recipe starts from, if it does.

    Raises:
        UserError: they are gone, others than the recipe names, or of another network.
    """
    if recipe.init_from is None:
        return
    _check_unchanged(recipe.init_from, weights_digest(recipe.init_from), recipe.init_weights)
    path = weights_file(recipe.init_from)
    try:
        network.load_state_dict(load_tensors(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"init_from: {path} is of another network than this run's ({reason})") from None


def check_unseen(folder: Path, recipe: ResolvedRecipe, data: Data) -> None:
    """Refuse to build on a run that was trained on images which are held out here.

    Raises:
        UserError: it was.
    """
    run = RunFolder(folder)
    if run.recipe.dataset != recipe.dataset:
        return
    trained = Split.load(run.path / SPLIT).train
    seen = int(torch.isin(data.split.validation, trained).sum())
    if seen:
        raise UserError(
            f"{folder} was trained on {seen} of the {len(data.split.validation)} images that are held out here; "
            "expected a run with the same hold-out"
        )


def teacher_recipes(recipe: ResolvedRecipe) -> dict[str, ResolvedRecipe]:
    """Return the recipes of the teachers that are named by a method.

    Returns {the teacher's name: the same recipe for that method, with nothing set}.

    Raises:
        UserError: a teacher that is neither a method nor a run's folder, or one that needs a teacher itself.
    """
    recipes = {}
    for name in make_strategy(recipe).teachers():
        if is_folder(name):
            continue
        try:
            method_parts(name)
        except UserError as error:
            raise UserError(f"teacher: {error}; expected a method, or the folder of a finished run") from None
        plain = recipe.with_values(method=name, method_settings={}, init_from=None, init_weights=None, ingredients={})
        recipes[name] = resolve(plain)
        if make_strategy(recipes[name]).teachers():
            raise UserError(f"teacher {name} itself needs a teacher; expected one that does not")
    return recipes


def load_teachers(recipe: ResolvedRecipe, out: Path, data: Data) -> dict[str, MultiExitNetwork]:
    """Return the trained networks of a recipe's teachers by name, in evaluation mode.

    Args:
        recipe: of the run that learns.
        out: the folder that holds the runs of teachers named by a method.
        data: the images of the run that learns.
    """
    by_method = teacher_recipes(recipe)
    networks = {}
    for name in make_strategy(recipe).teachers():
        folder = RunFolder(out / by_method[name].id if name in by_method else name)
        folder.results()  # tells how to resume one that is not finished
        if name not in by_method:
            _check_unchanged(name, run_weights_digest(name), recipe.ingredients.get(name))
        check_unseen(folder.path, recipe, data)
        networks[name] = load_network(folder, data).requires_grad_(False)
        if networks[name].num_classes != data.num_classes:
            raise UserError(f"a teacher of {networks[name].num_classes} classes can't teach {data.num_classes}")
    return networks


def load_side_network(recipe: ResolvedRecipe, source: str, name: str) -> Mapping[str, Tensor]:
    """Return the tensors of a side network of another run, one of the recipe's ingredients.

    Raises:
        UserError: it is gone, or another than the recipe names.
    """
    _check_unchanged(source, side_networks_digest(source), recipe.ingredients.get(source))
    return side_network(source, name)


def _check_unchanged(source: str, digest: str, planned: str | None) -> None:
    if planned is not None and digest != planned:
        raise UserError(f"the weights of {source} have changed since this run was planned; make a new run")
