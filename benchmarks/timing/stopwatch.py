"""Latency of trained networks: each round measures all networks on the same test images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from exitkit.benchmarks.timing.energy import energy_meter
from exitkit.inference.adaptive import AdaptiveInference
from exitkit.inference.rule import ExitRule
from exitkit.networks.pruning import prune_to

if TYPE_CHECKING:
    from exitkit.data.base import Data
    from exitkit.engine.engine import Engine
    from exitkit.networks.cascade import MultiExitNetwork

Boundary = Literal["model", "end-to-end"]
WARMUPS = 3


class Point(NamedTuple):
    """An operating point of a run, and the first exit that is as accurate on validation.

    Attributes:
        name: name of the operating point.
        rule: exit rule.
        matched: that exit, from 1.
    """

    name: str
    rule: ExitRule
    matched: int


@dataclass
class Subject:
    """A measured run: its network on the device, its images and its operating points."""

    network: MultiExitNetwork
    data: Data
    engine: Engine
    points: Sequence[Point]
    exits: list[list[float]] = field(default_factory=list)
    """Seconds per batch until each exit predicts, one row [K] per round."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Seconds per batch of each operating point and each network cut at an exit, one value per round."""
    joules: dict[str, float] = field(default_factory=dict)
    """Joules over all rounds, with the keys of `seconds`; empty without an energy meter."""

    def ways(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return the measured functions besides the exits: {name: images -> logits}."""
        ways: dict[str, Callable[[Tensor], Tensor]] = {}
        for point in self.points:
            ways[point.name] = _adaptive(self.network, point.rule)
            name = cut_name(point.matched)
            if name not in ways:
                ways[name] = _static(prune_to(self.network, point.matched))
        return ways


def cut_name(exit: int) -> str:
    """Return the name of the network cut at an exit."""
    return f"cut at exit {exit}"


def _adaptive(network: MultiExitNetwork, rule: ExitRule) -> Callable[[Tensor], Tensor]:
    adaptive = AdaptiveInference(network, rule)
    return lambda images: adaptive(images).logits


def _static(network: MultiExitNetwork) -> Callable[[Tensor], Tensor]:
    return lambda images: network(images).logits[0]


@torch.inference_mode()
def time_all(subjects: Sequence[Subject], batch_size: int, repeats: int, boundary: Boundary) -> None:
    """Measure every subject `repeats` times, after warm-up rounds; drift of the machine affects all subjects alike.

    Args:
        subjects: runs on one data set, with the same test images.
        batch_size: images per batch.
        repeats: measured rounds; each uses the next images.
        boundary: "model": images are on the device, and logits stay there; "end-to-end": includes reading, normalising
            and moving the images, and returning the classes to the CPU.
    """
    meter = energy_meter(subjects[0].engine.device.type)
    ways = [subject.ways() for subject in subjects]
    for number in range(-WARMUPS, repeats):
        order = range(len(subjects)) if number % 2 else reversed(range(len(subjects)))
        for at in order:
            _round(subjects[at], ways[at], number, batch_size, boundary, meter)


def _round(
    subject: Subject,
    ways: dict[str, Callable[[Tensor], Tensor]],
    number: int,
    batch_size: int,
    boundary: Boundary,
    meter: Callable[[], float] | None,
) -> None:
    positions = (number * batch_size + torch.arange(batch_size)) % len(subject.data.labels("test"))
    images = None if boundary == "end-to-end" else _read(subject, positions)
    times = list(_exit_times(subject, positions, images))
    if number >= 0:
        subject.exits.append(times)
    for name, way in ways.items():
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
    for output in subject.network.iterate(_read(subject, positions) if images is None else images):
        if images is None:
            output.logits.argmax(1).cpu()
        yield _now(subject) - began


def _read(subject: Subject, positions: Tensor) -> Tensor:
    (batch,) = subject.data.batches("test", [positions], augment=False, seed=0)
    return subject.engine.placement.images(batch.images)


def _now(subject: Subject) -> float:
    if subject.engine.device.type == "cuda":
        torch.cuda.synchronize()
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
