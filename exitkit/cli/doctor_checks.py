"""What `exitkit doctor` looks at, each check apart: one that fails in a way nobody thought of ends no other."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import NamedTuple

import click

from exitkit import plugins
from exitkit.cli import Broken, cli
from exitkit.errors import UserError

_FEW_GIB = 5.0


class Finding(NamedTuple):
    """What a check found: `state` is "ok", "note" (worth knowing) or "wrong"; `hint` is what to do about it."""

    check: str
    state: str
    detail: str
    hint: str = ""


def checks(data_dir: Path | None, out: Path) -> Iterator[Finding]:
    """Look at everything, and yield what is found as it is found."""
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
    except Exception as error:  # a broken installation breaks anywhere
        yield Finding(check, "wrong", " ".join(f"{type(error).__name__}: {error}".split()))


def _torch() -> Iterator[Finding]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("torch", "ok", f"{torch.__version__} ({build})")


def _torchvision() -> Iterator[Finding]:
    """torchvision names the very torch that it was built for."""
    from exitkit.data.torchvision_import import torchvision

    found, torch = version("torchvision"), version("torch").partition("+")[0]
    wanted = [match[1] for text in requires("torchvision") or () if (match := re.fullmatch(r"torch==([\d.]+).*", text))]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torchvision()
    if wanted and wanted[0] != torch:
        hint = f"install the torchvision that is of torch {torch}, or torch {wanted[0]}"
        yield Finding("torchvision", "note", f"{found} is of torch {wanted[0]}, torch is {torch}", hint)
    elif said:
        yield Finding("torchvision", "note", f"{found}: {said[-1].message}")
    else:
        yield Finding("torchvision", "ok", f"{found}, fits torch {torch}")


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("CPU", "ok", f"{cores} cores; a run uses 1 thread unless --threads says more")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            yield Finding(f"cuda:{number}", "ok", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    elif torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple's GPU")
    elif not shutil.which("nvidia-smi"):
        hint = "for a GPU of NVIDIA: its driver, and the CUDA build of torch and torchvision (PyTorch's page says how)"
        yield Finding("GPU", "ok", "none found; training runs on the CPU", hint)
    elif torch.version.cuda is None:
        hint = "install the CUDA build of torch and torchvision, by the line that PyTorch's installation page gives"
        yield Finding("GPU", "note", "there is one of NVIDIA, but this torch is a CPU build", hint)
    else:
        hint = f"torch is built for CUDA {torch.version.cuda}; `nvidia-smi` says which CUDA the driver is for"
        yield Finding("GPU", "note", "there is one of NVIDIA, but torch can't use it", hint)


def _data(data_dir: Path | None) -> Iterator[Finding]:
    """Read every data set that lies here, as a run would."""
    from exitkit.data.base import build_dataset
    from exitkit.runs.recipe import Recipe

    always = Recipe.model_fields["dataset"].default
    for name in plugins.registered("dataset"):
        try:
            with warnings.catch_warnings(action="ignore"):
                data = build_dataset(name, {}).load(data_dir, False)
        except UserError as error:
            yield Finding(f"data {name}", "wrong" if name == always else "note", _why_absent(str(error)))
        else:
            counts = [len(part) for part in (data.split.train, data.split.validation, data.split.test)]
            shape = "x".join(map(str, data.input_shape))
            yield Finding(f"data {name}", "ok", "{:,} + {:,} + {:,} images of ".format(*counts) + shape)


def _why_absent(message: str) -> str:
    """Shorten what a data set says of files that are not there."""
    place = re.search(r"can't be read from (\S+).*\(looked for ([^:)]+)", message)
    return f"not in {place[1]} (looked for {place[2]})" if place else message


def _folders(out: Path) -> Iterator[Finding]:
    from exitkit.cli.catalogue import store

    for what, path, needed in (("output", out, True), ("cache", store().parent, False)):
        there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
        free = shutil.disk_usage(there).free / 2**30
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            state, hint = ("wrong", "choose another folder by --out") if needed else ("note", "set XDG_CACHE_HOME")
            yield Finding(what, state, f"{path} can't be written", hint)
        elif free < _FEW_GIB:
            yield Finding(what, "note", f"{path}: only {free:.1f} GiB free", "free some space before a long comparison")
        else:
            yield Finding(what, "ok", f"{path}, {free:.0f} GiB free")


def _extras() -> Iterator[Finding]:
    """Which optional parts are installed, from the package's own metadata."""
    wanted: dict[str, list[str]] = {}
    for text in requires("exitkit") or ():
        package, of = re.match(r"[\w.-]+", text), re.search(r"extra\s*==\s*['\"]([^'\"]+)", text)
        if package and of:
            wanted.setdefault(of[1], []).append(package[0])
    for group, names in wanted.items():
        missing = sorted({needed for needed in names if not _is_installed(needed)})
        why = f"not installed: {', '.join(missing)}" if missing else _why_unusable(group)
        if why:
            yield Finding(f"[{group}]", "ok", f"optional, {why}", f"pip install 'exitkit[{group}]'")
        else:
            yield Finding(f"[{group}]", "ok", "installed")


def _why_unusable(group: str) -> str:
    """Return why the method that an extra is named after can't be had; what it takes itself is known to it alone."""
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
    """Load every plugin and command, ours and anyone else's."""
    count = 0
    for kind in plugins.KINDS:
        for name in plugins.registered(kind):
            count += 1
            try:
                plugins.load(kind, name)
            except UserError as error:
                yield Finding(f"{kind} {name}", "wrong", " ".join(str(error).split()), "mend or uninstall its package")
    for point in entry_points(group="exitkit.commands"):
        count += 1
        command = cli.get_command(click.Context(cli), point.name)
        if isinstance(command, Broken):
            yield Finding(f"command {point.name}", "wrong", command.reason, "mend or uninstall its package")
    yield Finding("plugins", "ok", f"{count} methods, backbones, data sets and commands looked at")
