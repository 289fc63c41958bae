"""Allocation of a batch's images to the exits, as in budgeted-batch inference."""

from __future__ import annotations

import torch
from torch import Tensor

from exitkit.inference.thresholds import exit_counts
from exitkit.networks import Outputs
from exitkit.strategy import at_least_float32


@torch.no_grad()
def confidences(outputs: Outputs) -> Tensor:
    """Return each exit's largest probability for each image, [B, K]."""
    return torch.stack([at_least_float32(logits).softmax(1).amax(1) for logits in outputs.logits], 1)


def allocate(confidence: Tensor, q: float) -> Tensor:
    """Allocate images to the exits (L2W-DEN, section 3.2): exit k takes the most confident of the remaining images.

    Args:
        confidence: confidence of each exit in each image, [N, K].
        q: ratio between the shares of neighbouring exits; exit k = 1..K-1 takes floor(N p_k) images, p_k ~ q^k, and
            the last exit takes the rest.

    Returns:
        the allocation as weights [N, K] that average 1 over the images for each exit: N / n_k for the n_k images of
        exit k, 0 elsewhere; all 0 for an exit without images.
    """
    samples, exits = confidence.shape
    free = torch.ones_like(confidence[:, 0], dtype=torch.bool)
    taken = torch.zeros_like(confidence)
    for index, count in enumerate([*exit_counts(samples, exits, [q])[0].tolist(), samples]):
        order = confidence[:, index].masked_fill(~free, -torch.inf).argsort(descending=True, stable=True)
        chosen = order[: min(count, int(free.sum()))]
        taken[chosen, index] = samples / max(len(chosen), 1)
        free[chosen] = False
    return taken
