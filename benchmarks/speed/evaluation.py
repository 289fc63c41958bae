"""Seconds of the papers' evaluation, of a comparison of exit policies, and of the start of the command line."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from exitkit.benchmarks.report.policies import Outputs, comparison, default_budgets, measure, policies
from exitkit.benchmarks.speed.row import Row, judged
from exitkit.benchmarks.speed.timing import Ratio, median_interval
from exitkit.files import read_json, write_json
from exitkit.inference.thresholds import PAPER_SHARES, budgeted, exit_counts
from exitkit.training.loop import train

SAMPLES, EXITS, CLASSES = 10_000, 10, 100


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


def policies_row(samples: int = SAMPLES, classes: int = CLASSES) -> Row:
    """Measure the default comparison of `exitkit policies`, once: all policies, cross-fitted.

    It is measured in CPU time, which other processes hardly change: it takes too long to be repeated.
    """
    generator = np.random.default_rng(0)
    costs = np.linspace(1, 10, EXITS)

    def part() -> tuple[np.ndarray, np.ndarray]:
        """Draw logits whose errors are shared by the exits in part, and later exits better."""
        labels = generator.integers(classes, size=samples)
        ease = np.linspace(0.7, 2.5, EXITS)[:, None] + 1.2 * generator.normal(size=(samples, 1, 1))
        noise = [generator.normal(size=(samples, exits, classes)) for exits in (1, EXITS)]
        logits = 0.6 * noise[0] + 0.7 * noise[1] + ease * np.eye(classes)[labels][:, None]
        return (1.5 * logits).astype(np.float32), labels

    outputs = Outputs(part(), part(), costs)
    began = time.process_time()
    comparison([measure(outputs, policies())], default_budgets(costs))
    took = time.process_time() - began
    target = f"policies: CPU seconds of the default comparison, {samples:,} images, {EXITS} exits, {classes} classes"
    return judged(target, 60, Ratio(took, took, took, took))


def command_rows(rounds: int, runs: int = 400) -> Iterator[Row]:
    """Measure `exitkit --help`, `exitkit list` and `exitkit report` of many runs, including the start of the process.

    Args:
        rounds: measurements of the help and of the list.
        runs: number of runs of the report, which is measured once.
    """
    for words, limit in (("--help", 0.15), ("list", 1.0)):
        target = f"start-up: seconds of `exitkit {words}`, warm"
        yield judged(target, limit, _seconds(partial(_exitkit, words), rounds))
    with tempfile.TemporaryDirectory() as folder:
        make_runs(Path(folder), runs)
        began = time.perf_counter()
        _exitkit("report", folder)
        took = time.perf_counter() - began
    yield judged(f"report: seconds of `exitkit report` of {runs} runs", 10, Ratio(took, took, took, took))


def _exitkit(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "exitkit", *words], check=True, stdout=subprocess.DEVNULL)


def make_runs(folder: Path, count: int) -> None:
    """Make a folder of finished runs of four methods: one of each is trained for an epoch, the others are copies."""
    methods = ("joint", "ge", "boostnet", "kd")
    few = {"batch_size": 32, "dataset_settings": {"per_class": 8, "validation": 40}}
    with tempfile.TemporaryDirectory() as place:
        trained = [train({"method": method, "epochs": 1, **few}, place).path for method in methods[:count]]
        for number in range(count):
            source = trained[number % len(trained)]
            copy = folder / f"{source.name}-copy{number}"
            shutil.copytree(source, copy)
            recipe = read_json(copy / "recipe.json")
            write_json(copy / "recipe.json", recipe | {"seed": number // len(trained)})


def _seconds(call: Callable[[], None], rounds: int) -> Ratio:
    call()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    median = statistics.median(times)
    return Ratio(median, *median_interval(times), median)
