"""How long a campaign will take, about: from runs of the same kind that are there, or from timed steps."""

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

_LIGHT = 1e9  # multiply-adds that a timed step may have
_FEWEST = 8  # images that a timed step has at least: L2W-DEN halves them, and its halves need batch statistics


class Estimate:
    """Estimates the seconds of runs; what was loaded or timed once is not loaded or timed again.

    Args:
        out: a folder whose finished runs say how long others of their kind take.
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
        """Return about how long a resolved recipe's run takes.

        Raises:
            UserError: its images are missing, or its network can't be built.
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
            except Exception as error:  # whatever someone's method raises: its run tells, and the others go on
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(Note(f"{recipe.method} can't be timed ({why})"), stacklevel=2)
                self._timings[kind] = Timing(len(data.split.train), 1, [0.0])
        timing = self._timings[kind]
        phases = make_phases(make_strategy(recipe), recipe.epochs, timing.exits)
        # A sweep may change how many phases there are; what it adds is taken to cost what the last one does.
        per_image = timing.phases + timing.phases[-1:] * len(phases)
        seconds = [phase.epochs * timing.images * each for phase, each in zip(phases, per_image, strict=False)]
        return sum(seconds[first_phase(recipe, len(phases)) :])

    def costs(self, recipe: ResolvedRecipe) -> list[ExitCost]:
        """Return what the exits of a resolved recipe's network cost.

        Raises:
            UserError: its images are missing, or its network can't be built.
        """
        # Imported when used: the command line's help must not load torch.
        from exitkit.networks.costs import cost
        from exitkit.runs.job import make_network

        kind = _alike(recipe, "backbone", "backbone_settings", "dataset", "dataset_settings")
        if kind not in self._costs:
            data = self._data(recipe)
            self._costs[kind] = cost(make_network(recipe, data.input_shape, data.num_classes))
        return self._costs[kind]

    def _data(self, recipe: ResolvedRecipe) -> Data:
        # Imported when used: the command line's help must not load torch.
        from exitkit.runs.job import load_data

        kind = _alike(recipe, "dataset", "dataset_settings", "data_dir")
        if kind not in self._loaded:
            self._loaded[kind] = load_data(recipe)
        return self._loaded[kind]


class Timing(NamedTuple):
    """Training images, the network's exits, and the seconds of one image in an epoch of each phase."""

    images: int
    exits: int
    phases: list[float]


def _kind(recipe: ResolvedRecipe) -> tuple[str, ...]:
    """Return what runs have in common that take equally long, but for their epochs and their method's settings."""
    where = ("backbone", "backbone_settings", "dataset", "dataset_settings")
    return _alike(recipe, "method", *where, "batch_size", "precision", "init_from")


def _alike(recipe: ResolvedRecipe, *names: str) -> tuple[str, ...]:
    return tuple(str(getattr(recipe, name)) for name in names)


def _timed(recipe: ResolvedRecipe, data: Data) -> Timing:
    """Time an epoch of one batch of each of a run's phases, set up as the run sets it up."""
    # Imported when used: the command line's help must not load torch.
    import torch

    from exitkit.engine.devices import choose_device, process_settings
    from exitkit.engine.engine import Engine
    from exitkit.networks.costs import cost
    from exitkit.runs.job import Job, make_network
    from exitkit.strategy.batch import LocalBatch
    from exitkit.training.phase import PhaseSetup

    recipe = recipe.with_values(compile=False)  # compiling takes longer than what is timed
    job = Job.make(recipe, data=data)
    teacher = make_network(recipe, data.input_shape, data.num_classes)
    engine = Engine(choose_device(recipe.device), recipe.precision)
    size = max(_FEWEST, min(recipe.batch_size, int(_LIGHT / cost(job.network)[-1].macs)))
    images = engine.placement.images(torch.randn(size, *data.input_shape))
    batch = LocalBatch.make(images, engine.placement.labels(torch.arange(size) % data.num_classes))
    engine.place(teacher.eval())
    phases = PhaseSetup(job, engine, dict.fromkeys(job.strategy.teachers(), teacher))
    seconds = []
    with process_settings(engine.device, threads=recipe.threads), engine.placement.forked_randomness():
        for number in range(len(job.phases)):
            begun = phases.begin(number)
            begun.train_mode()
            seconds.append(min(_seconds(begun, batch) for _ in range(2)) / size)
    return Timing(len(data.split.train), job.network.num_exits, seconds)


def _seconds(begun: BegunPhase, batch: LocalBatch) -> float:
    """Time an epoch of one batch."""
    # Imported when used: the command line's help must not load torch.
    import torch

    began = time.perf_counter()
    with contextlib.suppress(NonFiniteError):  # the run itself will tell that it diverges
        begun.phase.strategy.train_epoch(begun.run, [batch])
    if batch.images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_words(seconds: float) -> str:
    """Write a duration as a person would: "40 s", "12 min", "3 h 20 min", "5 days"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours < 36 else f"{round(seconds / 86400)} days"


def wall_time(seconds: Sequence[float], jobs: int) -> float:
    """Return how long runs of these durations take, longest first, `jobs` at a time."""
    lanes = [0.0] * max(jobs, 1)
    for each in sorted(seconds, reverse=True):
        lanes[lanes.index(min(lanes))] += each
    return max(lanes)
