"""Errors caused by user input; each message is one line: what was wrong, what was expected, the nearest choice."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TextIO

from exitkit.escaping import printable


class UserError(ValueError):
    """An error in the input; the command line prints its message as one line and exits with code 2."""


class NonFiniteError(UserError):
    """Training stopped at a NaN or infinite value; the last finite checkpoint is kept."""


class HeldError(UserError):
    """Another process holds the lock of this run."""


class DamagedError(UserError):
    """A file of a run or of a comparison is missing, damaged, or does not fit the others."""


class Note(UserWarning):
    """A notice that requires no action; the command line prints it as one line."""


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning as the command line and its workers print it; a `Note` is one line."""
    if issubclass(category, Note):
        return f"exitkit: {printable(str(message))}\n"
    return f"{filename}:{lineno}: {category.__name__}: {printable(str(message))}\n"


def print_warnings() -> None:
    """Print warnings on standard error as `format_warning` formats them, each text once."""
    printed: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = format_warning(message, category, filename, lineno)
        if text not in printed:
            printed.add(text)
            (file or sys.stderr).write(text)

    warnings.showwarning = show


class Interrupted(Exception):
    """Training was stopped by the user (SIGINT); the message states how to resume."""


def unknown(what: str, name: Any, known: Iterable[str]) -> UserError:
    """Return the error for a name that does not exist, with the nearest valid names, or with all if they are few.

    Args:
        what: the kind of name ("method", "field of boostnet").
        name: the name given; a script may also have given no text.
        known: all valid names.
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.5) if isinstance(name, str) else []
    if near:
        return UserError(f"unknown {what} {name!r}; did you mean {' or '.join(near)}?")
    if len(names) > _MANY:
        return UserError(f"unknown {what} {name!r}; expected one of {len(names)}, such as {', '.join(names[:5])}")
    return UserError(f"unknown {what} {name!r}; available: {', '.join(names) if names else 'none'}")


_MANY = 20
