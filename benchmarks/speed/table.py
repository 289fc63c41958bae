"""The tables of speed measurements on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from exitkit.benchmarks.speed.row import Row
    from exitkit.benchmarks.speed.training import Measured

_STYLES = {"met": "green", "missed": "red", "not-run": "dim"}


def print_facts(facts: Sequence[Measured], title: str) -> None:
    """Print the time and peak memory of a training step of each method."""
    table = Table(title=title)
    for head in ("method", "joint steps", "interval", "images/s", "peak MiB"):
        table.add_column(head, justify="left" if head == "method" else "right")
    for name, ratio, images, peak in facts:
        peak_text = "" if peak != peak else f"{peak:,.0f}"
        table.add_row(name, f"{ratio.median:.3f}", _interval(ratio.low, ratio.high), f"{images:.1f}", peak_text)
    Console().print(table)


def print_rows(rows: Sequence[Row]) -> None:
    """Print the targets with limit, measured value, interval and verdict."""
    table = Table(title="targets")
    for head in ("target", "limit", "measured", "interval", "verdict"):
        table.add_column(head, justify="left" if head in ("target", "verdict") else "right")
    for target, limit, measured, ci, verdict in rows:
        value = "–" if measured is None else f"{measured:.3f}"
        verdict_text = f"[{_STYLES[verdict]}]{verdict}[/]"
        table.add_row(target, f"{limit:g}", value, "" if ci is None else _interval(*ci), verdict_text)
    Console().print(table)


def _interval(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}"
