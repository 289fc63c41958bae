"""Other runs that a run builds on: the weights it starts from, and the teachers it learns from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exitkit.build import build_strategy, method_parts
from exitkit.data.base import Split
from exitkit.errors import UserError
from exitkit.files import disk_error, load_checkpoint, load_tensors
from exitkit.runs import SPLIT, WEIGHTS, RunFolder

if TYPE_CHECKING:
    from exitkit.data.base import Data
    from exitkit.network import MultiExitNetwork
    from exitkit.recipe import Recipe


def weights_file(init_from: str) -> Path:
    """Return the file of the weights that `init_from`, a finished run's folder or a safetensors file, stands for.

    Raises:
        UserError: it is neither.
    """
    path = Path(init_from)
    if path.is_dir():
        run = RunFolder(path)
        run.results()  # says how to go on with one that is not finished
        return run.own(WEIGHTS)
    if not path.is_file():
        raise UserError(f"init_from is {init_from}; expected the folder of a finished run, or a .safetensors file")
    return path


def digest(init_from: str) -> str:
    """Return what tells the weights of `init_from` from any others."""
    path = weights_file(init_from)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise disk_error(path, error) from None


def load_initial(recipe: Recipe, network: MultiExitNetwork) -> None:
    """Give the network the weights that the recipe starts from.

    Raises:
        UserError: they are gone, others than the recipe says, or of another network.
    """
    assert recipe.init_from is not None
    if digest(recipe.init_from) != recipe.init_weights:
        raise UserError(f"the weights of {recipe.init_from} have changed since this run was planned; make a new run")
    path = weights_file(recipe.init_from)
    try:
        network.load_state_dict(load_tensors(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"init_from: {path} is of another network than this run's ({reason})") from None


def check_unseen(folder: Path, recipe: Recipe, data: Data) -> None:
    """Refuse to build on a run that was trained on images which are held out here.

    Raises:
        UserError: it was.
    """
    run = RunFolder(folder)
    if run.recipe.dataset != recipe.dataset:
        return
    theirs = Split.load(run.path / SPLIT)
    seen = int(torch.isin(data.split.validation, theirs.train).sum())
    if seen:
        raise UserError(
            f"{folder} was trained on {seen} of the {len(data.split.validation)} images that are held out here; "
            "expected a run with the same hold-out"
        )


def teacher_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipes of the runs that a resolved recipe's method learns from and that are named by a method.

    Returns {the teacher's name: the same recipe for that method, with nothing set}.

    Raises:
        UserError: a teacher that is neither a method nor a run's folder.
    """
    found = {}
    for name in _teachers(recipe):
        if _is_folder(name):
            continue
        try:
            method_parts(name)
        except UserError as error:
            raise UserError(f"teacher: {error}; expected a method, or the folder of a finished run") from None
        plain = recipe.with_values(method=name, method_settings={}, init_from=None, init_weights=None)
        found[name] = plain.resolve()
        if _teachers(found[name]):
            raise UserError(f"teacher {name} itself needs a teacher; expected one that does not")
    return found


def load_teachers(recipe: Recipe, out: Path, data: Data) -> dict[str, MultiExitNetwork]:
    """Return the trained networks of a recipe's teachers by name, in evaluation mode; their runs lie in `out`."""
    from exitkit.exit_outputs import load_network

    by_method = teacher_recipes(recipe)
    found = {}
    for name in _teachers(recipe):
        folder = RunFolder(out / by_method[name].id if name in by_method else name)
        folder.results()  # says how to go on with one that is not finished
        check_unseen(folder.path, recipe, data)
        found[name] = load_network(folder, data).requires_grad_(False)
    return found


def side_network(folder: str, name: str) -> dict[str, Tensor]:
    """Return the tensors of a side network, as a finished run has left it.

    Raises:
        UserError: no finished run, or one without such a network.
    """
    from exitkit.training import CHECKPOINT_KEYS

    run = RunFolder(folder)
    run.results()
    saved = load_checkpoint(run.path / "checkpoint.pt", CHECKPOINT_KEYS)["auxiliaries"]
    if name not in saved:
        raise UserError(f"run {folder} has no {name} network; it has {', '.join(saved) or 'none'}")
    module: dict[str, Tensor] = saved[name]["module"]
    return module


def _teachers(recipe: Recipe) -> tuple[str, ...]:
    return build_strategy(recipe.method, **recipe.method_settings).teachers()


def _is_folder(name: str) -> bool:
    return (Path(name) / "recipe.json").is_file() or len(Path(name).parts) > 1
