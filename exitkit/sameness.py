"""Whether a run is still what it was: its images, and the code of its method."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from exitkit import plugins
from exitkit.build import build_dataset, method_parts
from exitkit.errors import Note, UserError
from exitkit.runs import RunFolder, flat_identity

if TYPE_CHECKING:
    from exitkit.recipe import Recipe


def images_digest(recipe: Recipe) -> str | None:
    """Return what tells a recipe's images from others, where they are whatever lies in its folder."""
    if recipe.data_dir is None:
        return None
    return build_dataset(recipe.dataset, recipe.dataset_settings).digest(Path(recipe.data_dir))


def code_digest(method: str) -> str:
    """Return what tells the files of a method (of each part of a composition) from changed ones."""
    known = hashlib.sha256()
    for part in method_parts(method):
        plugin = plugins.underlying(plugins.load("method", part))
        source = inspect.getsourcefile(plugin)
        known.update(Path(source).read_bytes() if source else b"")
    return known.hexdigest()[:16]


def check_images(run: RunFolder, recipe: Recipe) -> None:
    """See that the images of a run's results are those that lie where a recipe says now.

    Raises:
        UserError: they are others.
    """
    try:
        seen = run.results().get("images")
    except UserError:
        return  # there are none, or damaged ones, which a new evaluation mends
    if seen is not None and images_digest(recipe) not in (None, seen):
        raise UserError(
            f"run {run.path} was evaluated on other images than those in {recipe.data_dir} now; "
            "say where they lie by --data-dir DIR"
        )


def check_same(there: Iterable[tuple[RunFolder, Recipe]], *, tell: bool = True) -> None:
    """Look at runs that are there before they are taken for what recipes ask for.

    What may be no harm is told by a `Note`: another version of a method's file (it may be a comment), and other images
    under a run that is not finished (a damaged one may have been mended).

    Args:
        there: runs, finished or not, each with its recipe now, of the same identity.
        tell: whether to tell notes (one rank does).

    Raises:
        UserError: one is finished, and its images are others than those that lie there now.
    """
    listed: dict[tuple[str, str, str | None], str | None] = {}  # a folder is listed once for all of its runs
    for run, recipe in there:
        done, began = "is finished" if run.finished else "was begun", run.environment()
        if tell and began.get("code") not in (None, code_digest(recipe.method)):
            told = f"run {run.path} {done}, and the code of {recipe.method} has changed; another --out trains it anew"
            warnings.warn(Note(told), stacklevel=2)
        seen = run.results().get("images") if run.finished else began.get("images")
        place = (recipe.dataset, str(recipe.dataset_settings), recipe.data_dir)
        if seen is not None and place not in listed:
            listed[place] = images_digest(recipe)
        if seen is None or listed[place] in (None, seen):
            continue
        differs = f"run {run.path} {done}, on other images than those in {recipe.data_dir} now"
        if run.finished:
            raise UserError(f"{differs}; choose another --out")
        if tell:
            warnings.warn(Note(f"{differs}; another --out trains it on these alone"), stacklevel=2)


def unfinished_twin(recipe: Recipe, out: Path) -> str:
    """Say how an unfinished run in `out` of the same method, backbone, data set and seed differs, nearest first.

    For an error message; "" if there is none.
    """
    told: list[tuple[int, str]] = []
    wanted = flat_identity(recipe)
    for path in sorted(out.glob("[!.]*/recipe.json")):
        try:
            run = RunFolder(path.parent)
            there = run.identity
        except UserError:
            continue
        if run.finished or any(there[key] != wanted[key] for key in ("method", "backbone", "dataset", "seed")):
            continue
        changed = sorted(key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key))
        facts = ", ".join(f"{key}={there.get(key)} there, {wanted.get(key)} here" for key in changed[:3])
        told.append((len(changed), f"{path.parent} has {facts}"))
    return min(told)[1] if told else ""
