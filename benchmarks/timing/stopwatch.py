"""Latency of trained networks: each round measures all networks on the same test images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from exitkit.benchmarks.timing.energy import energy_meter
from exitkit.engine.devices import synchronise
from exitkit.inference.adaptive import AdaptiveInference
from exitkit.inference.engines import InferenceEngine, Moved, compare, prepare, run_all
from exitkit.inference.policy import ExitPolicy
from exitkit.networks.pruning import prune_to

if TYPE_CHECKING:
    from exitkit.data.base import Data
    from exitkit.engine.engine import Engine
    from exitkit.networks.cascade import MultiExitNetwork

Boundary = Literal["model", "end-to-end"]
ALL_EXITS = "all exits"
"""Name of the way that computes all exits and uses the last."""
WARMUPS = 3
COMPARED = 256
"""Test images on which an engine is compared with the network."""


class Point(NamedTuple):
    """An operating point of a run, and the first exit that is as accurate on validation.

    Attributes:
        name: name of the operating point.
        rule: exit policy.
        matched: that exit, from 1.
    """

    name: str
    rule: ExitPolicy
    matched: int


@dataclass
class Subject:
    """A measured run on one inference engine: its network on the device, its images and its operating points."""

    network: MultiExitNetwork
    data: Data
    engine: Engine
    points: Sequence[Point]
    inference: str = "eager"
    """Name of the inference engine."""
    changed: MultiExitNetwork | None = None
    """The network of the operating points, if their policies change it (see `ExitPolicy.placed_in`)."""
    exits: list[list[float]] = field(default_factory=list)
    """Seconds per batch until each exit predicts, one row [K] per round."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of a round's batches for all exits, each operating point and each static network, one value per round."""
    joules: dict[str, float] = field(default_factory=dict)
    """Joules over all rounds, with the keys of `seconds`; empty without an energy meter."""

    @cached_property
    def prepared(self) -> InferenceEngine:
        """The inference engine, prepared when it is first used, with torch's number of threads at that time."""
        return prepare(self.network, self.inference)

    @property
    def early(self) -> MultiExitNetwork:
        """The network of the operating points."""
        return self.network if self.changed is None else self.changed

    @cached_property
    def prepared_early(self) -> InferenceEngine:
        """The inference engine for the network of the operating points."""
        return self.prepared if self.changed is None else prepare(self.changed, self.inference)

    def ways(self, size: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return the measured functions besides the exits: {name: images -> logits}, in batches of `size`.

        Early exit collects the remaining images of several batches, if it is given several, before each stage. A
        static network has two forms: the network pruned to the exit, and the whole network's stages up to it.
        """
        ways = {ALL_EXITS: _chain(self.prepared, self.network.num_exits, size)}
        for point in self.points:
            ways[point.name] = _adaptive(AdaptiveInference(self.early, point.rule, engine=self.prepared_early), size)
            pruned, chain = static_names(point.matched)
            if pruned not in ways:
                ways[pruned] = _chain(prepare(prune_to(self.network, point.matched), self.inference), 1, size)
                ways[chain] = _chain(self.prepared, point.matched, size)
        return ways


def static_names(exit: int) -> tuple[str, str]:
    """Return the names of the two forms of the network that always uses one exit: pruned, and as a chain of stages."""
    return f"cut at exit {exit}", f"stages up to exit {exit}"


def moved(subject: Subject, point: Point) -> Moved:
    """Compare the subject's engine with the network on test images, at an operating point."""
    positions = torch.arange(min(COMPARED, len(subject.data.labels("test"))))
    return compare(subject.early, subject.prepared_early, point.rule, _read(subject, positions))


def _adaptive(adaptive: AdaptiveInference, size: int) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        if len(images) == size:
            return adaptive(images).logits
        return torch.cat([answers.logits for answers in adaptive.stream(images.split(size), size)])

    return run


def _chain(engine: InferenceEngine, exits: int, size: int) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        step = engine.select(images, size)
        if len(images) == size:
            return run_all(step, exits, images)[-1]
        return torch.cat([run_all(step, exits, batch)[-1] for batch in images.split(size)])

    return run


@torch.inference_mode()
def time_all(subjects: Sequence[Subject], batch_size: int, repeats: int, boundary: Boundary, batches: int = 1) -> None:
    """Measure every subject `repeats` times, after warm-up rounds; drift of the machine affects all subjects alike.

    Args:
        subjects: runs on one data set, with the same test images.
        batch_size: images per batch.
        repeats: measured rounds; each uses the next images.
        boundary: "model": images are on the device, and logits stay there; "end-to-end": includes reading, normalising
            and moving the images, and returning the classes to the CPU.
        batches: batches per round; the exits are measured on the first of them.
    """
    meter = energy_meter(subjects[0].engine.device.type)
    ways = [subject.ways(batch_size) for subject in subjects]
    for number in range(-WARMUPS, repeats):
        order = range(len(subjects)) if number % 2 else reversed(range(len(subjects)))
        for at in order:
            _round(subjects[at], ways[at], number, batch_size, batches, boundary, meter)


def _round(
    subject: Subject,
    ways: dict[str, Callable[[Tensor], Tensor]],
    number: int,
    batch_size: int,
    batches: int,
    boundary: Boundary,
    meter: Callable[[], float] | None,
) -> None:
    count = batch_size * batches
    positions = (number * count + torch.arange(count)) % len(subject.data.labels("test"))
    read = _read(subject, positions)  # untimed, so that every way finds the files in the system's memory
    images = None if boundary == "end-to-end" else read
    first = None if images is None else images[:batch_size]
    times = list(_exit_times(subject, positions[:batch_size], first))
    if number >= 0:
        subject.exits.append(times)
    measured = list(ways.items())
    for name, way in measured if number % 2 else reversed(measured):  # none always follows the same one
        before = meter() if meter else 0.0
        began = _now(subject)
        logits = way(_read(subject, positions) if images is None else images)
        if images is None:
            logits.argmax(1).cpu()
        took = _now(subject) - began
        if number >= 0:
            subject.seconds.setdefault(name, []).append(took)
            if meter:
                subject.joules[name] = subject.joules.get(name, 0.0) + meter() - before


def _exit_times(subject: Subject, positions: Tensor, images: Tensor | None) -> Iterator[float]:
    began = _now(subject)
    state, carry = _read(subject, positions) if images is None else images, None
    step = subject.prepared.select(state, len(positions))
    for index in range(subject.network.num_exits):
        logits, state, carry = step(index, state, carry)
        if images is None:
            logits.argmax(1).cpu()
        yield _now(subject) - began


def _read(subject: Subject, positions: Tensor) -> Tensor:
    (batch,) = subject.data.batches("test", [positions], augment=False, seed=0)
    return subject.engine.placement.images(batch.images)


def _now(subject: Subject) -> float:
    synchronise(subject.engine.device)
    return time.perf_counter()


def summary(seconds: Sequence[float], batch_size: int) -> dict[str, Any]:
    """Return milliseconds per image (percentiles and mean over rounds), and images per second from the mean.

    The throughput is computed from the mean, because with early exit the times of the rounds vary with their images.
    """
    milliseconds = 1000 * np.asarray(seconds) / batch_size
    p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99])
    mean = milliseconds.mean()
    values = {"p50": p50, "p95": p95, "p99": p99, "mean": mean, "images_per_second": 1000 / mean}
    return {name: float(value) for name, value in values.items()}
