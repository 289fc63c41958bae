"""Speed of a training process beside another one: what two processes share of caches and memory bandwidth."""

from __future__ import annotations

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor

import torch

from exitkit.benchmarks.speed.row import Row, judged
from exitkit.benchmarks.speed.timing import Ratio, median_interval, seconds
from exitkit.benchmarks.speed.work import Step, Work

_LIMIT = 0.9
_steps: dict[Work, Step] = {}


def scaling_row(work: Work) -> Row:
    """Measure a joint step in one process alone, and in two processes at the same time, by turns."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as first, ProcessPoolExecutor(1, spawn) as second:
        ratios, times = [], []
        for number in range(-1, work.rounds):
            alone = first.submit(_step_seconds, work).result()
            both = [pool.submit(_step_seconds, work) for pool in (first, second)]
            together = statistics.mean(future.result() for future in both)
            if number >= 0:  # the first round is not measured
                ratios.append(alone / together)
                times.append(together)
    ratio = Ratio(statistics.median(ratios), *median_interval(ratios), statistics.median(times))
    return judged("scaling: speed of a process beside another, in that of one alone", _LIMIT, ratio, at_least=True)


def _step_seconds(work: Work, steps: int = 3) -> float:
    """Return the duration of some steps; the network is made once per process."""
    torch.set_num_threads(1)
    if work not in _steps:
        _steps[work] = work.step("joint")
    step = _steps[work]
    return seconds(lambda: [step() for _ in range(steps)])
