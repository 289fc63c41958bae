"""Estimated time of a campaign, from finished runs of the same kind or from timed training steps."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from exitkit.errors import NonFiniteError, Note, UserError
from exitkit.runs.table import find_runs

if TYPE_CHECKING:
    from exitkit.data.base import Data
    from exitkit.networks.costs import ExitCost
    from exitkit.runs.recipe import ResolvedRecipe
    from exitkit.strategy.batch import LocalBatch
    from exitkit.training.phase import BegunPhase

_MAX_MACS = 1e9  # multiply-adds of a timed step, at most
_MIN_IMAGES = 8  # images in a timed step, at least: L2W-DEN halves the batch, and each half needs batch statistics


class Estimate:
    """Estimates the training time of runs; loaded data and timings are cached.

    Args:
        out: folder of runs; the times of finished runs are used for runs of the same kind.
    """

    def __init__(self, out: Path) -> None:
        self._known: dict[tuple[str, ...], float] = {}
        self._timings: dict[tuple[str, ...], Timing] = {}
        self._loaded: dict[tuple[str, ...], Data] = {}
        self._costs: dict[tuple[str, ...], list[ExitCost]] = {}
        try:
            runs = find_runs(out)
        except UserError:
            return
        for run in runs:
            recipe = run.recipe
            self._known[_kind(recipe)] = run.training_cost()["seconds"] / recipe.epochs

    def seconds(self, recipe: ResolvedRecipe) -> float:
        """Return the estimated training time of a run in seconds.

        Raises:
            UserError: the images are missing, or the network can't be built.
        """
        # Imported when used: the command line's help must not load torch.
        from exitkit.runs.job import first_phase, make_phases, make_strategy

        kind = _kind(recipe)
        if kind in self._known:
            return self._known[kind] * recipe.epochs
        if kind not in self._timings:
            data = self._data(recipe)
            try:
                self._timings[kind] = _timed(recipe, data)
            except UserError:
                raise
            except Exception as error:  # a method may raise anything; its own run will report it
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(Note(f"no time estimate for {recipe.method} ({reason})"), stacklevel=2)
                self._timings[kind] = Timing(len(data.split.train), 1, [0.0])
        timing = self._timings[kind]
        phases = make_phases(make_strategy(recipe), recipe.epochs, timing.exits)
        # A sweep may add phases; each added phase is assumed to cost as much as the last timed one.
        per_image = timing.phases + timing.phases[-1:] * len(phases)
        seconds = [phase.epochs * timing.images * cost for phase, cost in zip(phases, per_image, strict=False)]
        return sum(seconds[first_phase(recipe, len(phases)) :])

    def costs(self, recipe: ResolvedRecipe) -> list[ExitCost]:
        """Return the cost of each exit of a recipe's network.

        Raises:
            UserError: the images are missing, or the network can't be built.
        """
        # Imported when used: the command line's help must not load torch.
        from exitkit.networks.costs import cost
        from exitkit.runs.job import make_network

        kind = _key(recipe, "backbone", "backbone_settings", "dataset", "dataset_settings")
        if kind not in self._costs:
            data = self._data(recipe)
            self._costs[kind] = cost(make_network(recipe, data.input_shape, data.num_classes))
        return self._costs[kind]

    def _data(self, recipe: ResolvedRecipe) -> Data:
        # Imported when used: the command line's help must not load torch.
        from exitkit.runs.job import load_data

        kind = _key(recipe, "dataset", "dataset_settings", "data_dir")
        if kind not in self._loaded:
            self._loaded[kind] = load_data(recipe)
        return self._loaded[kind]


class Timing(NamedTuple):
    """Number of training images, number of exits, and seconds per image and epoch of each phase."""

    images: int
    exits: int
    phases: list[float]


def _kind(recipe: ResolvedRecipe) -> tuple[str, ...]:
    """Return a key of the fields that determine the time per epoch, except for the method's settings."""
    network_and_data = ("backbone", "backbone_settings", "dataset", "dataset_settings")
    return _key(recipe, "method", *network_and_data, "batch_size", "precision", "init_from")


def _key(recipe: ResolvedRecipe, *names: str) -> tuple[str, ...]:
    return tuple(str(getattr(recipe, name)) for name in names)


def _timed(recipe: ResolvedRecipe, data: Data) -> Timing:
    """Time an epoch of one batch in each phase of a run, set up as in training."""
    # Imported when used: the command line's help must not load torch.
    import torch

    from exitkit.engine.devices import choose_device, process_settings
    from exitkit.engine.engine import Engine
    from exitkit.networks.costs import cost
    from exitkit.runs.job import Job, make_network
    from exitkit.strategy.batch import LocalBatch
    from exitkit.training.phase import PhaseSetup

    recipe = recipe.with_values(compile=False)  # compilation would take longer than the timed step
    job = Job.make(recipe, data=data)
    teacher = make_network(recipe, data.input_shape, data.num_classes)
    engine = Engine(choose_device(recipe.device), recipe.precision)
    engine.place(teacher.eval())
    size = max(_MIN_IMAGES, min(recipe.batch_size, int(_MAX_MACS / cost(job.network)[-1].macs)))
    images = engine.placement.images(torch.randn(size, *data.input_shape))
    batch = LocalBatch.make(images, engine.placement.labels(torch.arange(size) % data.num_classes))
    phases = PhaseSetup(job, engine, dict.fromkeys(job.strategy.teacher_runs(), teacher))
    seconds = []
    with process_settings(engine.device, threads=recipe.threads), engine.placement.forked_randomness():
        for number in range(len(job.phases)):
            begun = phases.begin(number)
            begun.train_mode()
            seconds.append(min(_seconds(begun, batch) for _ in range(2)) / size)
    return Timing(len(data.split.train), job.network.num_exits, seconds)


def _seconds(begun: BegunPhase, batch: LocalBatch) -> float:
    """Return the seconds of an epoch of one batch."""
    # Imported when used: the command line's help must not load torch.
    import torch

    began = time.perf_counter()
    with contextlib.suppress(NonFiniteError):  # the run itself will report the divergence
        begun.phase.strategy.train_epoch(begun.run, [batch])
    if batch.images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_words(seconds: float) -> str:
    """Format a duration: "40 s", "12 min", "3 h 20 min", "5 days"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours < 36 else f"{round(seconds / 86400)} days"


def wall_time(seconds: Sequence[float], jobs: int) -> float:
    """Return the total time in seconds of runs of these durations, longest first, `jobs` in parallel."""
    lanes = [0.0] * max(jobs, 1)
    for duration in sorted(seconds, reverse=True):
        lanes[lanes.index(min(lanes))] += duration
    return max(lanes)
