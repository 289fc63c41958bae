"""A target of speed, what was measured of it, and whether it was met."""

from __future__ import annotations

from typing import Literal, NamedTuple

from exitkit.benchmarks.speed.timing import Ratio


class Row(NamedTuple):
    """One line of the table: `measured` (with its interval `ci`) is to be at most, or at least, the limit.

    None where it could not be measured here.
    """

    target: str
    limit: float
    measured: float | None
    ci: tuple[float, float] | None
    verdict: Literal["met", "missed", "not-run"]


def judged(target: str, limit: float, ratio: Ratio, *, at_least: bool = False) -> Row:
    """Return the row of a measured ratio: its median against the limit."""
    met = ratio.median >= limit if at_least else ratio.median <= limit
    return Row(target, limit, ratio.median, (ratio.low, ratio.high), "met" if met else "missed")


def not_run(target: str, limit: float) -> Row:
    """Return the row of what can't be measured on this machine."""
    return Row(target, limit, None, None, "not-run")
