"""The errors that a user can cause, each one clear line: what was wrong, what was expected, the nearest choice."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something in the input is wrong; the command line prints the message as one line and exits with code 2."""


class NonFiniteError(UserError):
    """Training met a NaN or an infinity and stopped; the last good checkpoint stays."""


class HeldError(UserError):
    """Another process is training this run."""


class Note(UserWarning):
    """Something that the user should know and need not mend; the command line prints it as one line."""


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Write a warning as the command line and its workers do: a `Note` is one line."""
    if issubclass(category, Note):
        return f"exitkit: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


class Interrupted(Exception):
    """Training was stopped by the user (SIGINT); the message says how to resume."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """Make the error for a name that does not exist, with the nearest names that do.

    Args:
        what: the kind of thing that was named ("method", "field of boostnet").
        name: the name given.
        known: every name that would have been right.
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return UserError(f"unknown {what} {name!r}; did you mean {' or '.join(near)}?")
    return UserError(f"unknown {what} {name!r}; there is {', '.join(names) if names else 'none'}")
