"""Entry points of all installed packages, read and loaded so that no package can stop or hide another one."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from exitkit.errors import Note, UserError

OWN = "exitkit"
"""The package whose commands and recipes are kept if another package has one of the same name."""


@dataclass(frozen=True)
class Point:
    """An entry point: a name for an object ("module:attribute") of a package."""

    name: str
    value: str
    group: str
    package: str

    @property
    def module(self) -> str:
        """The module of the object."""
        return self.value.partition(":")[0].strip()

    def load(self) -> Any:
        """Import the object; this may raise anything (see `foreign`)."""
        return importlib.metadata.EntryPoint(self.name, self.value, self.group).load()


def installed(group: str) -> list[Point]:
    """Return the entry points of a group, sorted by name, then by package; a package on the path twice counts once.

    A package whose list of entry points can't be read is left out, with a `Note` that names it.
    """
    points: dict[tuple[str, str, str], Point] = {}
    for distribution in importlib.metadata.distributions():
        chosen = [entry for entry in _entries(distribution) if entry.group == group]
        package = _package(distribution) if chosen else ""
        for entry in chosen:
            points.setdefault(
                (entry.name, package.lower(), entry.value), Point(entry.name, entry.value, group, package)
            )
    return sorted(points.values(), key=lambda point: (point.name, point.package, point.value))


def unreadable() -> dict[str, str]:
    """Return {package: reason} of the packages whose list of entry points can't be read."""
    reasons = {}
    for distribution in importlib.metadata.distributions():
        try:
            _read_entries(distribution)
        except Exception as error:  # see `_entries`
            reasons[_package(distribution)] = f"its list of entry points can't be read ({reason(error)})"
    return reasons


_read_entries: Any = vars(importlib.metadata.Distribution)["entry_points"].fget


def _entries(distribution: importlib.metadata.Distribution) -> importlib.metadata.EntryPoints:
    """Return the entry points of a package; none, and a `Note`, if they can't be read."""
    try:
        found: importlib.metadata.EntryPoints = _read_entries(distribution)
        return found
    except Exception as error:  # the files of a broken installation may contain anything
        notice = f"package {_package(distribution)} is left out: its list of entry points can't be read"
        warnings.warn(Note(f"{notice} ({reason(error)}); repair or uninstall it"), stacklevel=1)
        # torch, pydantic and others read the entry points of all packages when they are imported, and would fail.
        importlib.metadata.Distribution.entry_points = property(_entries)  # type: ignore[method-assign, assignment]
        return importlib.metadata.EntryPoints()


def by_name(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Return {name: entry points} of different objects; of several, that of exitkit comes first."""
    found: dict[str, dict[str, Point]] = {}
    for point in points:
        found.setdefault(point.name, {}).setdefault(point.value, point)
    return {name: sorted(same.values(), key=lambda p: p.package != OWN) for name, same in found.items()}


def several(what: str, points: Iterable[Point]) -> str:
    """Return the message for a name that several packages have."""
    return f"{what} comes from several packages ({_listed(points)}); uninstall all but one"


def _listed(points: Iterable[Point]) -> str:
    return ", ".join(f"{point.value} of {point.package}" for point in points)


@contextlib.contextmanager
def foreign(what: str, package: str = "") -> Iterator[None]:
    """Raise a UserError that names the package for any error of its code in the block.

    A UserError keeps its message; that for another error begins with `what`. KeyboardInterrupt is not changed: it comes
    from the user. What the code prints goes to standard error, because some commands print JSON.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a package may raise anything, even SystemExit
        message = str(error) if isinstance(error, UserError) else f"{what}: {reason(error)}"
        raise UserError(message + (f" (package {package})" if package else "")) from error


def reason(error: BaseException) -> str:
    """Return the type and the message of an error as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _package(distribution: importlib.metadata.Distribution) -> str:
    """Return the name of a package; of one whose metadata can't be read, the folder of the metadata."""
    with contextlib.suppress(Exception):
        if name := distribution.metadata["Name"]:
            return str(name)
    return str(getattr(distribution, "_path", "of unknown name"))
