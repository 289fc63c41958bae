"""Ratios of the times of two functions, measured alternately, so that other load on the machine affects both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.stats import binom


class Ratio(NamedTuple):
    """Time of a function relative to a base function: median of the paired ratios, with its interval.

    The interval contains the median with at least 95 % confidence (order statistics). With fewer than six pairs it is
    the whole range, whose confidence is lower.
    """

    median: float
    low: float
    high: float
    seconds: float
    """Median seconds of one call."""


def paired_ratios(ours: Callable[[], object], base: Callable[[], object], rounds: int, warmups: int = 1) -> Ratio:
    """Measure `ours` and `base` alternately; their order is reversed after each round.

    Args:
        ours, base: functions; each call is measured.
        rounds: measured pairs, at least 1.
        warmups: unmeasured pairs before them.
    """
    ratios, times = [], []
    for number in range(-warmups, rounds):
        if number % 2:
            one, other = seconds(ours), seconds(base)
        else:
            other, one = seconds(base), seconds(ours)
        if number >= 0:
            ratios.append(one / other)
            times.append(one)
    low, high = median_interval(ratios)
    return Ratio(statistics.median(ratios), low, high, statistics.median(times))


def median_seconds(call: Callable[[], object], rounds: int) -> float:
    """Return the median duration of a call, after one that is not measured."""
    call()
    return statistics.median(seconds(call) for _ in range(rounds))


def median_interval(values: list[float]) -> tuple[float, float]:
    """Return the narrowest symmetric pair of order statistics that contains the median with 95 % confidence."""
    ordered, n = sorted(values), len(values)
    outside = max((cut for cut in range(n // 2) if 2 * binom.cdf(cut, n, 0.5) <= 0.05), default=0)
    return ordered[outside], ordered[n - 1 - outside]


def seconds(call: Callable[[], object]) -> float:
    """Return the duration of a call: the time of the process on its processors or, with a GPU, that of the clock.

    The former does not count the time in which other processes have the processor.
    """
    if not torch.cuda.is_available():
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize()  # CUDA calls return before their work is done
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began
