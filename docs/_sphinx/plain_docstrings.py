"""Read docstrings as plain text: single backticks mean code, and characters of reStructuredText markup are escaped."""

from __future__ import annotations

import re
from typing import Any

_CODE = re.compile(r"(`+[^`]+`+)")
_MARKUP = re.compile(r"(?<!\\)([*|])|(?<=\w)_(?=\W|$)")


def _plain(text: str) -> str:
    def escape(match: re.Match[str]) -> str:
        return "\\" + match.group(0)

    pieces = _CODE.split(text)
    # A letter directly after code (`partial`s) needs an invisible separator.
    for index in range(1, len(pieces), 2):
        separator = r"\ " if pieces[index + 1][:1].isalnum() else ""
        pieces[index] = f"``{pieces[index].strip('`')}``{separator}"
    pieces[::2] = [_MARKUP.sub(escape, piece) for piece in pieces[::2]]
    return "".join(pieces)


_SHARED = re.compile(r"    \w+(, \w+)+:")

_COLON = "\ue000"
"""Replaces a colon that napoleon would read as the end of a type."""


def _together(line: str) -> str:
    """Join names that share a description (`rows, columns: names.`) into one name, as a field list requires."""
    shared = _SHARED.match(line)
    return line.replace(", ", ",", shared.group(0).count(",")) if shared else line


def _before(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [_together(line) for line in _plain("\n".join(lines)).split("\n")]
    in_returns = False
    for index, line in enumerate(lines):
        if line and not line.startswith(" "):
            in_returns = line == "Returns:" or (index == 0 and what in ("property", "attribute", "data"))
        if in_returns and line != "Returns:":
            lines[index] = line.replace(":", _COLON)


def _after(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def setup(app: Any) -> dict[str, bool]:
    """Process docstrings before and after napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", _before, priority=400)
    app.connect("autodoc-process-docstring", _after, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
