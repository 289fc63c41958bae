"""Measures of how the exits of a trained network affect each other, from its outputs or from the network and images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from exitkit.inference.scores import confidence
from exitkit.inference.thresholds import Floats
from exitkit.networks.ownership import owners
from exitkit.strategy.base import at_least_float32

if TYPE_CHECKING:
    from exitkit.networks.cascade import MultiExitNetwork


def rank_consistency(logits: ArrayLike) -> Floats:
    """Return Spearman's rank correlation of the confidences of each pair of exits, [K, K], from logits [N, K, C].

    A value near 1 means that two exits rank the images by difficulty in the same way (IMTA, figure 7). Ties get their
    mean rank.
    """
    correlation: Floats = pd.DataFrame(confidence(logits)).corr(method="spearman").to_numpy(dtype=np.float64)
    return correlation


def pruning_damage(
    network: MultiExitNetwork,
    importance_images: Tensor,
    importance_labels: Tensor,
    images: Tensor,
    labels: Tensor,
    share: float = 0.01,
) -> Floats:
    """Return the accuracy that exits lose when the parameters most important to one exit are zero (Meta-GF, figure 4).

    The importance of a parameter theta to exit e is |theta dL_e/dtheta|. Only parameters that all exits use are pruned.

    Args:
        network: a trained network; its state is restored.
        importance_images, importance_labels: [B, C, H, W] and [B], for the importances.
        images, labels: [N, C, H, W] and [N], for the accuracies.
        share: fraction of those parameters that is set to zero.

    Returns:
        [K, K] in percentage points: entry [e, k] is the loss of exit k when the parameters for exit e are zero.
    """
    training = [module for module in network.modules() if module.training]
    requires_grad = [parameter.requires_grad for parameter in network.parameters()]
    network.requires_grad_(True).eval()
    taps, network.taps = network.taps, []  # they would change the derivatives
    try:
        exits = network.num_exits
        shared = [network.get_parameter(name) for name, readers in owners(network).items() if len(readers) == exits]
        unpruned = _accuracies(network, images, labels)
        importances = _importances(network, shared, importance_images, importance_labels)
        originals = [parameter.detach().clone() for parameter in shared]
        damage = []
        for importance in importances:
            count = max(round(share * importance.numel()), 1) if importance.numel() else 0
            pruned = torch.zeros_like(importance, dtype=torch.bool)
            pruned[importance.topk(count).indices] = True
            masks = pruned.split([parameter.numel() for parameter in shared])
            with torch.no_grad():
                for parameter, mask in zip(shared, masks, strict=True):
                    parameter.masked_fill_(mask.view_as(parameter), 0.0)
                damage.append(unpruned - _accuracies(network, images, labels))
                for parameter, original in zip(shared, originals, strict=True):
                    parameter.copy_(original)
        return np.stack(damage)
    finally:
        network.taps = taps
        for module in training:
            module.training = True
        for parameter, required in zip(network.parameters(), requires_grad, strict=True):
            parameter.requires_grad_(required)


@torch.enable_grad()
def _importances(
    network: MultiExitNetwork, parameters: list[torch.nn.Parameter], images: Tensor, labels: Tensor
) -> list[Tensor]:
    """Return |theta dL_e/dtheta| of all values of the parameters for each exit e; gradients are added up in parts."""
    if not parameters:
        return [torch.empty(0)] * network.num_exits
    sums = [[torch.zeros_like(parameter) for parameter in parameters] for _ in range(network.num_exits)]
    for pictures, truths in zip(images.split(64), labels.split(64), strict=True):
        for total, z in zip(sums, network(pictures).logits, strict=True):
            loss = F.cross_entropy(at_least_float32(z), truths, reduction="sum") / len(labels)
            for value, gradient in zip(total, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
                value += gradient
    return [
        torch.cat([(p * g).abs().flatten().detach() for p, g in zip(parameters, total, strict=True)]) for total in sums
    ]


@torch.no_grad()
def _accuracies(network: MultiExitNetwork, images: Tensor, labels: Tensor) -> Floats:
    """Return each exit's accuracy in percent, [K]."""
    hits = torch.zeros(network.num_exits, dtype=torch.float64)
    for pictures, truths in zip(images.split(256), labels.split(256), strict=True):
        hits += torch.stack([(z.argmax(1) == truths).sum() for z in network(pictures).logits]).cpu()
    accuracies: Floats = (100 * hits / len(labels)).numpy()
    return accuracies
