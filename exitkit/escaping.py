"""Text of users, files and other packages, written so that every format shows it as text.

A title, a note, the name of a class, a reason or a phase may contain control characters, markup or formulas. There is
one function per format; HTML is escaped by the template of `exitkit.benchmarks.report.page`, and tables on a terminal
by `exitkit.cli.terminal.Console`. `counted` writes a number with its noun.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_ALLOWED = "\t\n"
_DIRECTIONS = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # they change the order of the text after them
_CONTROL = {code: "?" for code in [*range(32), *range(127, 160), *_DIRECTIONS] if chr(code) not in _ALLOWED}

_MARKDOWN = re.compile(r"[\\`*\[\]<>|~]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|^(?:[#+-]|\d+\.)(?=\s)")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}

_LATEX = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        '"': r"\textquotedbl{}",
        "±": r"$\pm$",
        "−": "$-$",
        "–": "--",
        "<": "$<$",
        ">": "$>$",
    }
)
_PROBABILITY = re.compile(r"\bp \$<\$ (\d[\d.]*\d)")

_FORMULA = re.compile(r"\s*[=+\-@]|[\t\r\n]")


def printable(text: str) -> str:
    """Return text for a terminal: control characters, which could move the cursor or hide text, become `?`."""
    return text.translate(_CONTROL)


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun: `1 epoch`, `1,200 epochs`; `plural` is that of nouns that need more than an `s`."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def one_line(text: str) -> str:
    """Return text on one line, without control characters."""
    return printable(" ".join(text.split()))


def in_markdown(text: str) -> str:
    """Return text for Markdown, on one line: nothing in it is markup, HTML or the end of a table's cell."""
    return _MARKDOWN.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), one_line(text))


def code_in_markdown(text: str) -> str:
    """Return text as code for Markdown."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {one_line(text)} {fence}" if "`" in text else f"`{one_line(text)}`"


def in_latex(text: str) -> str:
    """Return text for LaTeX, on one line; `p < 0.05`, minus signs and the like are set as mathematics."""
    return _PROBABILITY.sub(r"$p < \1$", one_line(text).translate(_LATEX))


def in_csv(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table for CSV: text that a spreadsheet would execute as a formula begins with an apostrophe."""
    return frame.map(_no_formula) if len(frame) else frame


def _no_formula(value: object) -> object:
    if not isinstance(value, str):
        return value
    return f"'{printable(value)}" if _FORMULA.match(value) and not _is_number(value) else printable(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
