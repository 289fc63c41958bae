"""Allocation: a batch's images shared out among the exits as budgeted-batch inference shares out a data set."""

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
    """Share images out among the exits (L2W-DEN, section 3.2): exit k takes the most confident of those still there.

    Args:
        confidence: [N, K], each exit's confidence in each image.
        q: ratio between the shares of neighbouring exits; exit k = 1..K-1 takes floor(N p_k), p_k ~ q^k, the last one
            all that are left.

    Returns:
        the partition as weights [N, K] that average 1 over the images for each exit: N / n_k where exit k took an image
        (n_k of them), 0 elsewhere; all 0 for an exit that gets none.
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
