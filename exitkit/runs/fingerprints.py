"""Fingerprints: digests of the code and the images of a run, which detect that they have changed."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from exitkit import plugins
from exitkit.errors import Note, UserError
from exitkit.plugins import method_parts
from exitkit.runs.folder import RunFolder
from exitkit.runs.job import images_digest
from exitkit.runs.recipe import Recipe


def code_digest(method: str) -> str:
    """Return a digest of the source files of a method, or of all parts of a composition, and of their imports.

    Imported modules count if they are in the same package: `exitkit.methods` for exitkit's own methods, the top-level
    package for others.
    """
    digest = hashlib.sha256()
    for part in method_parts(method):
        plugin = plugins.underlying(plugins.load("method", part))
        package = _package_of(plugin.__module__)
        for path in sorted(set().union(*(_source_files(base.__module__, package) for base in plugin.__mro__))):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _package_of(module: str) -> str:
    top = module.partition(".")[0]
    return top if top != __name__.partition(".")[0] else module.rpartition(".")[0]


def _source_files(module: str, package: str) -> set[Path]:
    """Return the files of a module and of all modules of the package that it imports, directly or indirectly."""
    files: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in files or name not in sys.modules or not f"{name}.".startswith(f"{package}."):
            continue
        try:
            source = inspect.getsourcefile(sys.modules[name])
            text = Path(source or "").read_text(encoding="utf-8")
            waiting += _imported(ast.parse(text), name)
        except (TypeError, OSError, ValueError):  # no Python file
            continue
        files[name] = Path(str(source))
    return set(files.values())


def _imported(tree: ast.Module, module: str) -> Iterator[str]:
    """Yield the modules that a file imports; of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*parents, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def check_same(existing: Iterable[tuple[RunFolder, Recipe]], *, tell: bool = True) -> None:
    """Check that existing runs have the current code and images of their recipes, before they are reused.

    Differences that may be harmless give a `Note`: changed code of a method (which may be a comment), and changed
    images of a run that is not finished (a damaged image may have been replaced).

    Args:
        existing: runs, finished or not, each with its current recipe of the same identity.
        tell: whether to show notes; only one rank does.

    Raises:
        UserError: a finished run was made from other images than those that are now in the folder.
    """
    digests: dict[tuple[str, str, str | None], str | None] = {}  # a folder is read once for all of its runs
    for run, recipe in existing:
        done, began = "is finished" if run.finished else "was begun", run.environment()
        if tell and began.get("code") not in (None, code_digest(recipe.method)):
            changed = f"the code of {recipe.method} has changed; another --out trains it again"
            warnings.warn(Note(f"run {run.path} {done}, and {changed}"), stacklevel=2)
        images = run.results().get("images") if run.finished else began.get("images")
        place = (recipe.dataset, str(recipe.dataset_settings), recipe.data_dir)
        if images is not None and place not in digests:
            digests[place] = images_digest(recipe)
        if images is None or digests[place] in (None, images):
            continue
        differs = f"run {run.path} {done}, on other images than those in {recipe.data_dir} now"
        if run.finished:
            raise UserError(f"{differs}; choose another --out")
        if tell:
            warnings.warn(Note(f"{differs}; another --out trains it on these alone"), stacklevel=2)
