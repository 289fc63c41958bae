"""A toy problem: two exits with conflicting losses of two shared parameters, and the path of each gradient method.

It is similar to figure 1 of Meta-GF (Sun et al., ECCV 2022). The paper does not give its two functions; these are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from exitkit.networks.cascade import Head, MultiExitNetwork
from exitkit.strategy.base import OBJECTIVE, UPDATE, TrainingStrategy
from exitkit.strategy.batch import LocalBatch
from exitkit.strategy.composition import Composition, build_strategy
from exitkit.strategy.run import Run
from exitkit.training.local import local_run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from exitkit.data.base import Batch
    from exitkit.networks.cascade import Outputs

START = (-2.0, 0.3)
STEPS, RATE = 120, 0.03
ANGLES = (0.35, -0.35)
"""Direction of the valley of each exit's loss, in radians."""
SIZES = (1.0, 0.3)
"""Scale of each exit's loss."""
BEST = tuple((1.4 * math.cos(angle), 1.4 * math.sin(angle)) for angle in ANGLES)
"""Minimum of each exit's loss, where it is 0."""


def losses(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses [...] of both exits at points w [..., 2]: two narrow valleys that cross at the origin.

    f_k = s_k ((a_k - 1.4)^2 / 8 + 2 b_k^2), where a_k is the coordinate along the valley and b_k the one across it.
    Between the valleys, the gradients of the exits conflict.
    """
    values = []
    for angle, size in zip(ANGLES, SIZES, strict=True):
        along = w[..., 0] * math.cos(angle) + w[..., 1] * math.sin(angle)
        across = w[..., 1] * math.cos(angle) - w[..., 0] * math.sin(angle)
        values.append(size * ((along - 1.4) ** 2 / 8 + 2 * across**2))
    return values[0], values[1]


class _Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(START, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), 2)


@dataclass(eq=False)
class _ToyLosses(TrainingStrategy):
    """The loss of each exit is its toy function; the images are ignored."""

    slots: ClassVar[frozenset[str]] = frozenset({OBJECTIVE})

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        return [losses(embedding)[index] for index, embedding in enumerate(outputs.embeddings)]


def gradient_methods(names: Iterable[str]) -> list[str]:
    """Return the methods that combine the exits' gradients into one update, after joint and ge.

    Methods that weight the images of a batch are left out: the toy problem has none.
    """
    matches = ["joint", "ge"]
    for name in names:
        strategy = build_strategy(name)
        weights_images = type(strategy).sample_weights is not TrainingStrategy.sample_weights
        if strategy.claims() == {UPDATE} and not weights_images:
            matches.append(name)
    return matches


def path(method: str) -> np.ndarray:
    """Return the points [STEPS + 1, 2] of a method's optimisation path from `START`."""
    torch.manual_seed(0)
    point = _Point()
    network = MultiExitNetwork(
        [point, nn.Identity()],
        [Head(nn.Identity(), nn.Linear(2, 2, dtype=torch.float64)) for _ in range(2)],
        (1, 1, 1),
        2,
    )
    network.heads.requires_grad_(False)
    strategy = Composition({"toy": _ToyLosses(), method: build_strategy(method)})
    run = local_run(network, strategy, torch.optim.SGD([point.w], RATE))
    batch = [LocalBatch.make(torch.zeros(2, 1, 1, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))]
    points = [point.w.detach().clone()]
    run.position.epochs = STEPS
    for step in range(STEPS):
        run.position.epoch = step
        strategy.train_epoch(run, batch)
        points.append(point.w.detach().clone())
    return torch.stack(points).numpy()
