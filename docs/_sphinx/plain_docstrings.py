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
    return "".join(f"``{p.strip('`')}``" if p.startswith("`") else _MARKUP.sub(escape, p) for p in pieces)


def _process(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    whole = _plain("\n".join(lines))
    lines[:] = whole.split("\n")


def setup(app: Any) -> dict[str, bool]:
    """Come before napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
