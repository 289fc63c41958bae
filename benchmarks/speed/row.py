"""A speed target, its measurement, and the verdict."""

from __future__ import annotations

from typing import Literal, NamedTuple

from exitkit.benchmarks.speed.timing import Ratio


class Row(NamedTuple):
    """A row of the table: the target is met if `measured` (with interval `ci`) is at most, or at least, the limit.

    Both are None if the target was not measured, and the interval is, if it was measured once.
    """

    target: str
    limit: float
    measured: float | None
    ci: tuple[float, float] | None
    verdict: Literal["met", "missed", "not-run"]


class Profile(NamedTuple):
    """Where the time of a missed target is: {operation: share of the time, 0..1}, the largest shares."""

    target: str
    shares: dict[str, float]


def judged(target: str, limit: float, ratio: Ratio, *, at_least: bool = False) -> Row:
    """Return the row of a measured ratio, whose median is compared with the limit."""
    met = ratio.median >= limit if at_least else ratio.median <= limit
    interval = (ratio.low, ratio.high) if ratio.low < ratio.high else None
    return Row(target, limit, ratio.median, interval, "met" if met else "missed")


def not_run(target: str, limit: float) -> Row:
    """Return the row of a target that can't be measured on this machine."""
    return Row(target, limit, None, None, "not-run")
