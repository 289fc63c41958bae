"""Fingerprints: digests of the code and the images of a run, which detect that they have changed."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import typing
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from exitkit import plugins
from exitkit.data.base import Part
from exitkit.errors import Note, UserError
from exitkit.plugins import method_parts
from exitkit.runs.folder import RunFolder
from exitkit.runs.job import Job, images_digest
from exitkit.runs.recipe import EXECUTION, Recipe, flat_identity

_COMPARED = 64
"""Number of training images that ranks compare."""


def start_facts(recipe: Recipe) -> dict[str, str]:
    """Return {name: value} of what all ranks of a run must have in common before it begins: recipe, images and code."""
    library = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        library.update(path.read_bytes())
    return flat_identity(recipe) | {
        "digest of the images": images_digest(recipe) or "absent",
        "digest of the method's code": code_digest(recipe.method),
        "digest of exitkit's code": library.hexdigest()[:16],
        "version of exitkit": version("exitkit"),
        "version of torch": torch.__version__,
    }


def job_facts(job: Job) -> dict[str, str]:
    """Return {name: value} of what all ranks must have in common before training: images, split and initial weights."""
    data, images, weights = job.data, hashlib.sha256(), hashlib.sha256()
    images.update("\0".join(data.class_names).encode(errors="surrogateescape"))
    for part in typing.get_args(Part):
        images.update(_bytes(data.labels(part)) + _bytes(getattr(data.split, part)))
    (batch,) = data.batches("train", [torch.arange(min(_COMPARED, len(data.split.train)))], augment=False, seed=0)
    images.update(_bytes(batch.images))
    for name, tensor in job.network.state_dict().items():
        weights.update(name.encode() + _bytes(tensor))
    digests = {"images and split": images, "initial weights": weights}
    return {f"digest of the {name}": digest.hexdigest()[:16] for name, digest in digests.items()}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


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

    Differences that may be harmless give a `Note`: changed code of a method (which may be a comment), changed images
    of a run that is not finished (a damaged image may have been replaced), and values of execution that a finished run
    does not use, such as another device.

    Args:
        existing: runs, finished or not, each with its current recipe of the same identity.
        tell: whether to show notes; only one rank does.

    Raises:
        UserError: a finished run was made from other images than those that are now in the folder.
    """
    digests: dict[tuple[str, str, str | None], str | None] = {}  # a folder is read once for all of its runs
    notes: dict[tuple[str, str], list[Path]] = {}
    for run, recipe in existing:
        done, began = "finished" if run.finished else "begun", run.environment()
        if began.get("code") not in (None, code_digest(recipe.method)):
            changed = f"and the code of {recipe.method} has changed; another --out trains it again"
            notes.setdefault((done, changed), []).append(run.path)
        if run.finished and (unused := _unused(run.recipe, recipe)):
            notes.setdefault((done, f"so {', '.join(unused)} {_be(unused)} not used"), []).append(run.path)
        images = run.results().get("images") if run.finished else began.get("images")
        place = (recipe.dataset, str(recipe.dataset_settings), recipe.data_dir)
        if images is not None and place not in digests:
            digests[place] = images_digest(recipe)
        if images is None or digests[place] in (None, images):
            continue
        differs = f"other images than those {recipe.place_of_images} now"
        if run.finished:
            raise UserError(f"run {run.path} is finished, on {differs}; choose another --out")
        notes.setdefault((done, f"on {differs}; another --out trains it on these alone"), []).append(run.path)
    for (done, text), paths in notes.items() if tell else ():
        which = f"run {paths[0]} {'is' if done == 'finished' else 'was'}"
        if len(paths) > 1:
            which = f"{len(paths)} runs such as {paths[0]} {'are' if done == 'finished' else 'were'}"
        warnings.warn(Note(f"{which} {done}, {text}"), stacklevel=2)


def _unused(stored: Recipe, given: Recipe) -> list[str]:
    """Return the options of execution that differ from those of a finished run, unless they have their default."""
    options = []
    for key in sorted(EXECUTION - {"init_from", "download"}):  # both have had their effect on the recipe
        value, before = getattr(given, key), getattr(stored, key)
        same = key == "data_dir" and None not in (value, before) and Path(value).resolve() == Path(before).resolve()
        if value not in (before, Recipe.model_fields[key].default) and not same:
            options.append(f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}"))
    for kind, name in (("backbone", given.backbone), ("dataset", given.dataset)):
        settings, before = getattr(given, f"{kind}_settings"), getattr(stored, f"{kind}_settings")
        plugin = plugins.load(kind, str(name))
        for key, field in plugins.fields(plugin).items():
            if field.metadata.get("execution") and settings.get(key) not in (before.get(key), field.default):
                options.append(f"--set {key}={settings[key]}")
    return options


def _be(names: Sequence[str]) -> str:
    return "are" if len(names) > 1 else "is"
