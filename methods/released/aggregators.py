"""PCGrad and CAGrad as Meta-GF's published comparison computes them.

Code: https://github.com/SYVAE/MetaGF, which has compiled files of its two rivals only. PCGrad there may also project a
changed gradient off its own original, and takes the mean over the exits of a parameter that all of them read, but the
sum of any other. CAGrad there finds its weights by 21 evaluations of gradient descent instead of a convex solver, and
divides the result by 1 + c^2. The learning rates of that comparison are unknown.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def projection_weights(gramian: Tensor, generator: torch.Generator) -> Tensor:
    """Return how much of each exit's gradient the sum of the projected ones holds, [K].

    For every exit, all originals in random order, its own among them: where the product is negative, that is taken off.
    """
    dots = gramian.double().cpu()
    exits = len(dots)
    mixed = torch.eye(exits, dtype=torch.float64)
    for row in mixed:
        for other in torch.randperm(exits, generator=generator).tolist():
            product = dots[other] @ row
            if product < 0:
                row[other] -= product / dots[other, other]
    return mixed.sum(0).to(gramian)


@torch.enable_grad()
def descent_weights(gramian: Tensor, c: float) -> Tensor:
    """Return  (1/K + lambda w) / (1 + c^2)  by stochastic gradient descent on  g_w . g_mean + c |g_mean| |g_w|."""
    dots = gramian.detach().double().cpu()
    dots = dots / (dots.diagonal() + 1e-4).sqrt().mean() ** 2
    to_mean = dots.mean(1)
    radius = c * (to_mean.mean() + 1e-4).sqrt()
    scores = torch.zeros(len(dots), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([scores], lr=25, momentum=0.5)
    best, lowest = scores.detach().clone(), math.inf
    for _ in range(21):
        w = scores.softmax(0)
        value = w @ to_mean + radius * (w @ dots @ w + 1e-4).sqrt()
        if value.item() < lowest:
            best, lowest = scores.detach().clone(), value.item()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    w = best.softmax(0)
    reach = radius / ((w @ dots @ w + 1e-4).sqrt() + 1e-4)
    return ((1 / len(dots) + reach * w) / (1 + c**2)).to(gramian)
