"""PCGrad and CAGrad as Meta-GF's published comparison computes them.

Code: https://github.com/SYVAE/MetaGF, which contains these two methods as compiled files only. Its PCGrad also projects
a changed gradient against its own original gradient; it takes the mean over the exits for a parameter that all exits
read, and the sum for any other. Its CAGrad computes its weights by gradient descent with 21 evaluations instead of a
convex solver, and divides the result by 1 + c^2. The learning rates of that comparison are unknown.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def projection_weights(gramian: Tensor, generator: torch.Generator) -> Tensor:
    """Return the coefficients of the exits' gradients in the sum of the projected gradients, [K].

    The gradient of each exit is projected against all original gradients, its own included, in random order: if the
    inner product is negative, the component along the original gradient is subtracted.
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
    """Return  (1/K + lambda w) / (1 + c^2), with w from gradient descent on  g_w . g_mean + c |g_mean| |g_w|, [K]."""
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
