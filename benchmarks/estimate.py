"""How long a campaign will take, about: from runs of the same kind that are there, or from a few timed steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exitkit.errors import UserError
from exitkit.runs import find_runs

if TYPE_CHECKING:
    from exitkit.recipe import Recipe

_LIGHT = 5e9  # multiply-adds that a timed step may have


class Estimate:
    """Estimates the seconds of runs; what was timed once is not timed again.

    Args:
        out: a folder whose finished runs say how long others of their kind take.
    """

    def __init__(self, out: Path) -> None:
        self._known: dict[tuple[str, ...], float] = {}
        self._steps: dict[tuple[str, ...], tuple[int, int, float]] = {}
        try:
            runs = find_runs(out)
        except UserError:
            return
        for run in runs:
            recipe = run.recipe
            assert recipe.epochs is not None
            self._known[(recipe.method, *_kind(recipe))] = run.training_cost()["seconds"] / recipe.epochs

    def seconds(self, recipe: Recipe) -> float:
        """Return about how long a resolved recipe's run takes.

        Raises:
            UserError: its images are missing, or its network can't be built.
        """
        from exitkit.build import build_strategy

        assert recipe.epochs is not None
        per_epoch = self._known.get((recipe.method, *_kind(recipe)))
        if per_epoch is not None:
            return per_epoch * recipe.epochs
        images, exits, per_image = self._step(recipe)
        phases = build_strategy(recipe.method, **recipe.method_settings).phases(recipe.epochs, exits)
        return sum(phase.epochs * phase.strategy.passes(exits) for phase in phases) * images * per_image

    def _step(self, recipe: Recipe) -> tuple[int, int, float]:
        """Return the training images of a recipe, its network's exits, and the seconds of one image in a joint step."""
        kind = _kind(recipe)
        if kind not in self._steps:
            self._steps[kind] = _timed(recipe)
        return self._steps[kind]


def _kind(recipe: Recipe) -> tuple[str, ...]:
    names = ("backbone", "backbone_settings", "dataset", "dataset_settings", "batch_size", "precision")
    return tuple(str(getattr(recipe, name)) for name in names)


def _timed(recipe: Recipe) -> tuple[int, int, float]:
    import torch

    from exitkit.costs import cost
    from exitkit.engine import Engine, choose_device
    from exitkit.exit_outputs import load_data, make_network

    data = load_data(recipe)
    network = make_network(recipe, data.input_shape, data.num_classes)
    engine = Engine(choose_device(recipe.device), precision=recipe.precision)
    macs = cost(network)[-1].macs
    assert recipe.batch_size is not None
    batch = max(2, min(recipe.batch_size, int(_LIGHT / macs)))
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        engine.place(network)
        images, labels = torch.randn(batch, *data.input_shape), torch.zeros(batch, dtype=torch.int64)
        best = math.inf
        for _ in range(3):
            began = time.perf_counter()
            with engine.autocast():
                outputs = network(engine.images(images)).logits
            losses = [torch.nn.functional.cross_entropy(o.float(), engine.labels(labels)) for o in outputs]
            sum(losses, torch.zeros((), device=engine.device)).backward()
            if engine.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return len(data.split.train), network.num_exits, best / batch


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
