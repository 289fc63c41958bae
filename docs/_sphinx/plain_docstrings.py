"""Docstrings are plain text: single backticks are code, and what reStructuredText would take for markup is not."""

from __future__ import annotations

import re
from typing import Any

_CODE = re.compile(r"(`+[^`]+`+)")
_MARKUP = re.compile(r"(?<!\\)([*|])|(?<=\w)_(?=\W|$)")


def _plain(text: str) -> str:
    def escape(found: re.Match[str]) -> str:
        return "\\" + found.group(0)

    pieces = _CODE.split(text)
    # A letter right behind code (`partial`s) needs a separator that is not shown.
    for place in range(1, len(pieces), 2):
        ends = r"\ " if pieces[place + 1][:1].isalnum() else ""
        pieces[place] = f"``{pieces[place].strip('`')}``{ends}"
    pieces[::2] = [_MARKUP.sub(escape, piece) for piece in pieces[::2]]
    return "".join(pieces)


_SHARED = re.compile(r"    \w+(, \w+)+:")

_COLON = "\ue000"
"""Stands in for a colon that napoleon would take for the end of a type."""


def _together(line: str) -> str:
    """Keep names that share a meaning (`rows, columns: names.`) one name, which a field list can hold."""
    shared = _SHARED.match(line)
    return line.replace(", ", ",", shared.group(0).count(",")) if shared else line


def _before(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [_together(line) for line in _plain("\n".join(lines)).split("\n")]
    returned = False
    for place, line in enumerate(lines):
        if line and not line.startswith(" "):
            returned = line == "Returns:" or (place == 0 and what in ("property", "attribute", "data"))
        if returned and line != "Returns:":
            lines[place] = line.replace(":", _COLON)


def _after(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def setup(app: Any) -> dict[str, bool]:
    """Stand before and behind napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", _before, priority=400)
    app.connect("autodoc-process-docstring", _after, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
