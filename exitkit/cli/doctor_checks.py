"""The checks of `exitkit doctor`; an unexpected error in one check does not stop the others."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import click

from exitkit import plugins
from exitkit.cli import Broken, cli
from exitkit.entry_points import OWN, by_name, foreign, installed, reason, unreadable
from exitkit.errors import UserError
from exitkit.escaping import counted

_FEW_GIB = 5.0
_REPAIR = "repair or uninstall its package"


class Finding(NamedTuple):
    """The result of a check: `state` is "ok", "note" (no error) or "wrong"; `hint` is how to solve the problem."""

    check: str
    state: str
    detail: str
    hint: str = ""


def checks(data_dir: Path | None, out: Path) -> Iterator[Finding]:
    """Run all checks, and yield each result as soon as it is known."""
    yield Finding("exitkit", "ok", f"{version('exitkit')}, Python {platform.python_version()} ({sys.executable})")
    yield from _guarded("torch", _torch())
    yield from _guarded("torchvision", _torchvision())
    yield from _guarded("devices", _devices())
    yield from _guarded("data", _data(data_dir))
    yield from _guarded("folders", _folders(out))
    yield from _guarded("extras", _extras())
    yield from _guarded("plugins", _plugins())


def _guarded(check: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    try:
        yield from findings
    except (Exception, SystemExit) as error:  # a broken installation may raise any error
        yield Finding(check, "wrong", reason(error))


def _torch() -> Iterator[Finding]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("torch", "ok", f"{torch.__version__} ({build})")


def _torchvision() -> Iterator[Finding]:
    """Compare torch with the version that torchvision requires, which is the one it was built for."""
    from exitkit.data.torchvision_import import torchvision

    installed, torch = version("torchvision"), version("torch").partition("+")[0]
    pinned = (re.fullmatch(r"torch==([\d.]+).*", text) for text in requires("torchvision") or ())
    required = [match[1] for match in pinned if match]
    with warnings.catch_warnings(record=True) as reported:
        warnings.simplefilter("always")
        torchvision()
    if required and required[0] != torch:
        hint = f"install the torchvision built for torch {torch}, or torch {required[0]}"
        yield Finding("torchvision", "note", f"{installed} is built for torch {required[0]}, torch is {torch}", hint)
    elif reported:
        yield Finding("torchvision", "note", f"{installed}: {reported[-1].message}")
    else:
        yield Finding("torchvision", "ok", f"{installed}, built for torch {torch}")


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("CPU", "ok", f"{counted(cores, 'core')}; a run uses 1 thread unless --threads is set")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            yield Finding(f"cuda:{number}", "ok", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    elif torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple's GPU")
    elif not shutil.which("nvidia-smi"):
        hint = "an NVIDIA GPU needs its driver and the CUDA build of torch and torchvision (see pytorch.org)"
        yield Finding("GPU", "ok", "no GPU found; training runs on the CPU", hint)
    elif torch.version.cuda is None:
        hint = "install the CUDA build of torch and torchvision, with the command given on pytorch.org"
        yield Finding("GPU", "note", "an NVIDIA GPU is installed, but torch is a CPU build", hint)
    else:
        hint = f"torch is built for CUDA {torch.version.cuda}; `nvidia-smi` prints the CUDA version of the driver"
        yield Finding("GPU", "note", "an NVIDIA GPU is installed, but torch can't use it", hint)


def _data(data_dir: Path | None) -> Iterator[Finding]:
    """Read every data set whose files exist, as a run does."""
    from exitkit.cli.catalogue import make
    from exitkit.runs.recipe import Recipe

    default = Recipe.model_fields["dataset"].default
    for name, point in plugins.registered("dataset").items():
        package = "" if point.package == OWN else point.package
        try:
            dataset = make("dataset", name)
        except UserError as error:
            if name == default:
                yield Finding(f"data {name}", "wrong", str(error))
            continue  # the check of all plugins reports the others
        try:
            with warnings.catch_warnings(action="ignore"), foreign(f"data set {name}", package):
                data = dataset.load(data_dir, False)
                counts = [len(part) for part in (data.split.train, data.split.validation, data.split.test)]
                shape = "x".join(map(str, data.input_shape))
        except UserError as error:
            message = _shortened(str(error).removeprefix(f"data set {name}: "))
            if data_dir is None and message.endswith("expected --data-dir DIR"):
                yield Finding(f"data {name}", "ok", "not checked", "your own images: exitkit doctor --data-dir DIR")
                continue
            yield Finding(f"data {name}", "wrong" if name == default else "note", message)
        else:
            yield Finding(f"data {name}", "ok", "{:,} + {:,} + {:,} images of ".format(*counts) + shape)


def _shortened(message: str) -> str:
    """Shorten the error of a data set whose files are missing."""
    place = re.search(r"can't be read from (\S+).*\(looked for ([^:)]+)", message)
    return f"not found in {place[1]} (looked for {place[2]})" if place else message


def _folders(out: Path) -> Iterator[Finding]:
    from exitkit.cli.catalogue import store

    for what, path, needed in (("output", out, True), ("cache", store().parent, False)):
        existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free / 2**30
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            state, hint = ("wrong", "choose another folder with --out") if needed else ("note", "set XDG_CACHE_HOME")
            yield Finding(what, state, f"{path} can't be written", hint)
        elif free < _FEW_GIB:
            yield Finding(what, "note", f"{path}: only {free:.1f} GiB free", "free some space before a long comparison")
        else:
            yield Finding(what, "ok", f"{path}, {free:.0f} GiB free")


def _extras() -> Iterator[Finding]:
    """Check which optional packages are installed, from exitkit's metadata."""
    extras: dict[str, list[str]] = {}
    for text in requires("exitkit") or ():
        package, extra = re.match(r"[\w.-]+", text), re.search(r"extra\s*==\s*['\"]([^'\"]+)", text)
        if package and extra:
            extras.setdefault(extra[1], []).append(package[0])
    for group, names in extras.items():
        missing = sorted({package for package in names if not _is_installed(package)})
        problem = f"not installed: {', '.join(missing)}" if missing else _method_error(group)
        if problem:
            yield Finding(f"[{group}]", "ok", f"optional, {problem}", f"pip install 'exitkit[{group}]'")
        else:
            yield Finding(f"[{group}]", "ok", "installed")


def _method_error(group: str) -> str:
    """Return why the method with the name of an extra can't be used, or ""; only the method knows its requirements."""
    if group not in plugins.registered("method"):
        return ""
    try:
        plugins.configure("method", group, {})
    except UserError as error:
        return str(error).partition(";")[0]
    return ""


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _plugins() -> Iterator[Finding]:
    """Load the plugins, recipes and commands of all installed packages."""
    from exitkit.cli.catalogue import check, entries

    count = 0
    for kind in plugins.KINDS:
        for name in plugins.registered(kind):
            count += 1
            try:
                check(kind, name)
            except UserError as error:
                yield Finding(f"{kind} {name}", "wrong", " ".join(str(error).split()), _REPAIR)
    for entry in entries("recipes"):
        count += 1
        if entry["summary"].startswith("not usable: "):
            yield Finding(f"recipe {entry['name']}", "wrong", entry["summary"].removeprefix("not usable: "), _REPAIR)
    for name in by_name(installed("exitkit.commands")):
        count += 1
        command = cli.get_command(click.Context(cli), name)
        if isinstance(command, Broken):
            yield Finding(f"command {name}", "wrong", command.reason, _REPAIR)
    for package, problem in unreadable().items():
        yield Finding(f"package {package}", "wrong", problem, _REPAIR)
    yield Finding("plugins", "ok", f"{count} methods, backbones, data sets, recipes and commands checked")
