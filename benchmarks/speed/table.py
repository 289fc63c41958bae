"""The tables of speed measurements on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from exitkit.cli.terminal import Console

if TYPE_CHECKING:
    from exitkit.benchmarks.speed.roofline import Roofline
    from exitkit.benchmarks.speed.row import Profile, Row
    from exitkit.benchmarks.speed.training import Measured, Speedup

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


def print_speedups(speedups: Sequence[Speedup]) -> None:
    """Print the speed of each method in that of its plain loop, with intervals."""
    forms = list(speedups[0].ratios)
    table = Table(title="speed, in that of the plain loop")
    for head in ("method", *forms):
        table.add_column(head, justify="left" if head == "method" else "right")
    for name, ratios in speedups:
        table.add_row(name, *(f"{r.median:.2f} ({r.low:.2f} to {r.high:.2f})" for r in ratios.values()))
    Console().print(table)


def print_profiles(profiles: Sequence[Profile]) -> None:
    """Print where the time of the steps is that missed their targets."""
    for target, shares in profiles:
        table = Table("operation", title=f"missed: {target}")
        table.add_column("share of the time", justify="right")
        for operation, share in shares.items():
            table.add_row(operation, f"{100 * share:.1f} %")
        Console().print(table)


def print_rooflines(rooflines: Sequence[Roofline]) -> None:
    """Print the limits of the core, and the time of a step against them."""
    table = Table(title="a joint step against the limits of the core")
    heads = ("precision", "peak GFLOP/s", "peak GB/s", "arithmetic, ms", "memory, ms", "measured, ms")
    for head in heads:
        table.add_column(head, justify="left" if head == "precision" else "right")
    for precision, flops, bandwidth, *seconds in rooflines:
        times = (f"{1e3 * second:,.0f}" for second in seconds)
        table.add_row(precision, f"{flops / 1e9:,.0f}", f"{bandwidth / 1e9:,.1f}", *times)
    Console().print(table)


def _interval(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}"
