"""Estimated time and memory of a campaign, from finished runs of the same kind or from training steps."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from exitkit.benchmarks.report.labels import name_runs
from exitkit.errors import NonFiniteError, Note, UserError
from exitkit.runs.recipe import flat_identity
from exitkit.runs.table import find_runs, intact

if TYPE_CHECKING:
    from exitkit.data.base import Data
    from exitkit.networks.costs import ExitCost
    from exitkit.runs.recipe import ResolvedRecipe
    from exitkit.strategy.base import Phase
    from exitkit.strategy.batch import LocalBatch
    from exitkit.training.phase import BegunPhase

_MAX_MACS = 1e9  # multiply-adds of a timed step, at most
_MIN_IMAGES = 8  # images in a timed step, at least: L2W-DEN halves the batch, and each half needs batch statistics


class Estimate:
    """Estimates the training time and the peak memory of runs; loaded data and timings are cached.

    Args:
        out: folder of runs; the values of finished runs are used for runs of the same kind.
        seconds_per_run: seconds of every run, if they are known; nothing is timed then.
        read_data: whether images may be read and steps be timed; if not, runs of which no run of the same kind is
            finished have an unknown time and memory.
    """

    def __init__(self, out: Path, seconds_per_run: float | None = None, read_data: bool = True) -> None:
        self._given, self._reads = seconds_per_run, read_data
        self._known: dict[tuple[str, ...], dict[str, float]] = {}
        self._timings: dict[tuple[str, ...], Timing] = {}
        self._loaded: dict[tuple[str, ...], Data] = {}
        self._costs: dict[tuple[str, ...], list[ExitCost]] = {}
        try:
            runs = intact(find_runs(out), records=True)
        except UserError:
            return
        for run in runs:
            recipe = run.recipe
            self._known[_kind(recipe)] = run.training_cost()
            self._known[_kind(recipe)]["seconds"] /= recipe.epochs

    def seconds(self, recipe: ResolvedRecipe) -> float:
        """Return the estimated training time of a run in seconds; NaN: unknown.

        Raises:
            UserError: the images are missing, or the network can't be built.
        """
        # Imported when used: the command line's help must not load torch.
        from exitkit.runs.job import first_phase, make_phases, make_strategy

        kind = _kind(recipe)
        if self._given is not None:
            return self._given
        if kind in self._known:
            return self._known[kind]["seconds"] * recipe.epochs
        if not self._reads:
            return math.nan
        timing = self._timing(recipe)
        phases = make_phases(make_strategy(recipe), recipe.epochs, timing.exits)
        # A sweep may add phases; each added phase is assumed to cost as much as the last timed one.
        steps = timing.phases + timing.phases[-1:] * len(phases)
        seconds = [timing.images * _per_image(phase, step) for phase, step in zip(phases, steps, strict=False)]
        return sum(seconds[first_phase(recipe, phases) :])

    def peak_mib(self, recipe: ResolvedRecipe) -> float:
        """Return the estimated peak memory of a run's process in MiB, on a GPU that of its tensors; NaN: unknown.

        Raises:
            UserError: the images are missing, or the network can't be built.
        """
        kind = _kind(recipe)
        if kind in self._known:
            return self._known[kind]["memory_mib"]
        return self._timing(recipe).peak_mib if self._reads and self._given is None else math.nan

    def _timing(self, recipe: ResolvedRecipe) -> Timing:
        kind = _kind(recipe)
        if kind not in self._timings:
            data = self._data(recipe)
            try:
                self._timings[kind] = _timed(recipe, data)
            except UserError:
                raise
            except Exception as error:  # a method may raise anything; its own run will report it
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(Note(f"no time estimate for {recipe.method} ({reason})"), stacklevel=2)
                self._timings[kind] = Timing(len(data.split.train), 1, [Step(0.0)])
        return self._timings[kind]

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
            self._costs[kind] = cost(make_network(recipe, data.input_shape, data.num_classes, weights=False))
        return self._costs[kind]

    def check_linear(self, recipe: ResolvedRecipe) -> None:
        """Check that last-layer Laplace can be applied to a recipe's network, as its method adapts it.

        Raises:
            UserError: it can't; or the images are missing, or the network can't be built.
        """
        # Imported when used: the command line's help must not load torch.
        from exitkit.runs.embeddings import check_linear
        from exitkit.runs.job import adapt, make_network, make_strategy

        data = self._data(recipe)
        network = make_network(recipe, data.input_shape, data.num_classes, weights=False)
        adapt(network, make_strategy(recipe), recipe.epochs)
        try:
            check_linear(network)
        except UserError as error:
            raise UserError(f"{recipe.method} on {recipe.backbone}: {error}") from None

    def images(self, recipes: Sequence[ResolvedRecipe], check: bool) -> dict[str, list[str]]:
        """Return {data set: lines that describe its images}, for each data set, and settings of it, of the recipes.

        If images may not be read, the lines are from the catalogue.

        Args:
            recipes: recipes of runs.
            check: also check that all images can be read.

        Raises:
            UserError: images are missing or damaged.
        """
        # Imported when used: the command line's help must not load torch.
        from exitkit.data.describe import describe, describe_catalogued
        from exitkit.runs.job import make_dataset

        labels = name_runs([flat_identity(recipe) for recipe in recipes])
        lines: dict[str, list[str]] = {}
        for names, recipe in zip(labels, recipes, strict=True):
            if names.dataset not in lines and not self._reads:
                lines[names.dataset] = describe_catalogued(make_dataset(recipe))
            elif names.dataset not in lines:
                data = self._data(recipe)
                checked = data.check() if check else ""
                lines[names.dataset] = [*describe(data), *([checked] if checked else [])]
        return lines

    def _data(self, recipe: ResolvedRecipe) -> Data:
        # Imported when used: the command line's help must not load torch.
        from exitkit.runs.job import load_data

        kind = _key(recipe, "dataset", "dataset_settings", "data_dir")
        if kind not in self._loaded:
            self._loaded[kind] = load_data(recipe)
        return self._loaded[kind]


class Step(NamedTuple):
    """Seconds per image: of a training step on images; of the trunk, and of a step on its features, if it is frozen."""

    images: float
    trunk: float = 0.0
    features: float = 0.0


class Timing(NamedTuple):
    """Number of training images, number of exits, the timed step of each phase, and peak memory."""

    images: int
    exits: int
    phases: list[Step]
    peak_mib: float = math.nan


def _per_image(phase: Phase, step: Step) -> float:
    """Return the seconds per image of a whole phase."""
    # Imported when used: the command line's help must not load torch.
    from exitkit.training.features import stores_features

    if phase.trunk is not None and stores_features(phase):
        return step.trunk * max(phase.trunk.views or 0, 1) + phase.epochs * step.features
    return phase.epochs * step.images


def _kind(recipe: ResolvedRecipe) -> tuple[str, ...]:
    """Return a key of the fields that determine the time per epoch, except for the method's settings."""
    network_and_data = ("backbone", "backbone_settings", "dataset", "dataset_settings")
    return _key(recipe, "method", *network_and_data, "batch_size", "precision", "layout", "init_from")


def _key(recipe: ResolvedRecipe, *names: str) -> tuple[str, ...]:
    return tuple(str(getattr(recipe, name)) for name in names)


def _timed(recipe: ResolvedRecipe, data: Data) -> Timing:
    """Time an epoch of one batch in each phase of a run, set up as in training."""
    # Imported when used: the command line's help must not load torch.
    import torch

    from exitkit.engine.devices import choose_device, process_settings
    from exitkit.engine.engine import Engine
    from exitkit.engine.memory import begin_peak, give_back_freed, peak_mib
    from exitkit.networks.costs import cost
    from exitkit.runs.job import Job, make_network
    from exitkit.strategy.batch import LocalBatch
    from exitkit.training.phase import PhaseSetup

    recipe = recipe.with_values(compile=False)  # compilation would take longer than the timed step
    job = Job.make(recipe, data=data)
    teacher = make_network(recipe, data.input_shape, data.num_classes, weights=False)
    engine = Engine(choose_device(recipe.device), recipe.precision, layout=recipe.layout)
    engine.place(teacher.eval())
    size = max(_MIN_IMAGES, min(recipe.batch_size, int(_MAX_MACS / cost(job.network)[-1].macs)))
    images = engine.placement.images(torch.randn(size, *data.input_shape))
    batch = LocalBatch.make(images, engine.placement.labels(torch.arange(size) % data.num_classes))
    phases = PhaseSetup(job, engine, dict.fromkeys(job.strategy.teacher_runs(), teacher))
    give_back_freed()
    begin_peak(engine.device)
    before = peak_mib(engine.device)
    steps = []
    with process_settings(engine.device, threads=recipe.threads), engine.placement.forked_randomness():
        for number in range(len(job.phases)):
            begun = phases.begin(number)
            begun.train_mode()
            steps.append(_step(begun, batch))
    # The memory of a step grows with the batch, which may be larger than the timed one.
    step_mib = (peak_mib(engine.device) - before) * max(recipe.batch_size / size, 1)
    return Timing(len(data.split.train), job.network.num_exits, steps, before + step_mib)


def _step(begun: BegunPhase, batch: LocalBatch) -> Step:
    """Time the steps of a phase on a batch."""
    # Imported when used: the command line's help must not load torch.
    import torch

    from exitkit.engine.devices import synchronise
    from exitkit.strategy.batch import LocalBatch

    network, size = begun.run.network, len(batch.labels)

    def train(images: Any) -> None:
        with contextlib.suppress(NonFiniteError):  # the run itself will report the divergence
            begun.phase.strategy.train_epoch(begun.run, [LocalBatch.make(images, batch.labels)])

    def seconds(call: Callable[[], object]) -> float:
        times = []
        for _ in range(2):
            began = time.perf_counter()
            call()
            synchronise(batch.labels.device)
            times.append(time.perf_counter() - began)
        return min(times) / size

    step = seconds(lambda: train(batch.images))
    if begun.phase.trunk is None:
        return Step(step)
    with torch.no_grad():
        trunk, features = seconds(lambda: network.features(batch.images)), network.features(batch.images)
    return Step(step, trunk, seconds(lambda: train(features)))


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
    lanes = [0.0] * max(min(jobs, len(seconds)), 1)
    for duration in sorted(seconds, reverse=True):
        lanes[lanes.index(min(lanes))] += duration
    return max(lanes)
