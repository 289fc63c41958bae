"""Seconds of the papers' evaluation, and of the start of the command line."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from exitkit.benchmarks.speed.row import Row, judged
from exitkit.benchmarks.speed.timing import Ratio, median_interval
from exitkit.inference.thresholds import PAPER_SHARES, budgeted, exit_counts

SAMPLES, EXITS = 10_000, 10


def evaluation_row(rounds: int) -> Row:
    """Measure the evaluation of 39 budgeted operating points with 10,000 samples and 10 exits, including thresholds."""
    generator = np.random.default_rng(0)
    validation, test = generator.random((2, SAMPLES, EXITS))
    correct, costs = generator.random((SAMPLES, EXITS)) < 0.7, np.arange(1.0, EXITS + 1)

    def evaluate() -> None:
        budgeted(validation, test, correct, costs, exit_counts(SAMPLES, EXITS, PAPER_SHARES))

    return judged(
        "evaluation: seconds of 39 operating points, 10,000 images, 10 exits", 0.1, _seconds(evaluate, rounds)
    )


def help_row(rounds: int) -> Row:
    """Measure `exitkit --help`, including the start of the process."""

    def show_help() -> None:
        subprocess.run([sys.executable, "-m", "exitkit", "--help"], check=True, stdout=subprocess.DEVNULL)

    return judged("start-up: seconds of `exitkit --help`, warm", 0.25, _seconds(show_help, rounds))


def _seconds(call: Callable[[], None], rounds: int) -> Ratio:
    call()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    median = statistics.median(times)
    return Ratio(median, *median_interval(times), median)
