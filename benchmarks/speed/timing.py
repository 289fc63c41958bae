"""How long something takes in units of something else, measured in turns: whatever else the machine does hits both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.stats import binom


class Ratio(NamedTuple):
    """How many times as long as the base something takes: the median of the paired ratios, with its interval.

    The interval holds the median of the ratios with at least 95 % confidence (order statistics; with fewer than six
    pairs it is the whole range, which can't be that sure).
    """

    median: float
    low: float
    high: float
    seconds: float
    """Median seconds of one call."""


def paired_ratios(ours: Callable[[], object], base: Callable[[], object], rounds: int, warmups: int = 1) -> Ratio:
    """Time `ours` and `base` in turns, the order changing from round to round.

    Args:
        ours, base: what is timed, each call whole.
        rounds: pairs that count, at least 1.
        warmups: pairs before them that do not.
    """
    ratios, times = [], []
    for number in range(-warmups, rounds):
        if number % 2:
            one, other = _seconds(ours), _seconds(base)
        else:
            other, one = _seconds(base), _seconds(ours)
        if number >= 0:
            ratios.append(one / other)
            times.append(one)
    low, high = median_interval(ratios)
    return Ratio(statistics.median(ratios), low, high, statistics.median(times))


def median_interval(values: list[float]) -> tuple[float, float]:
    """Return the narrowest pair of order statistics, equally far from both ends, that holds the median at 95 %."""
    ordered, n = sorted(values), len(values)
    outside = max((cut for cut in range(n // 2) if 2 * binom.cdf(cut, n, 0.5) <= 0.05), default=0)
    return ordered[outside], ordered[n - 1 - outside]


def _seconds(call: Callable[[], object]) -> float:
    _settle()
    began = time.perf_counter()
    call()
    _settle()
    return time.perf_counter() - began


def _settle() -> None:
    """Wait for the GPU, if there is one: its work is only begun when a call returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
