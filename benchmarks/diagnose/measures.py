"""What a trained network shows of how its exits get on: pure functions of outputs, or of the network and images."""

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
    """Return Spearman's correlation between every two exits' confidences, [K, K], from logits [N, K, C].

    Near 1, an image that is easy for one exit is easy for the other (IMTA, figure 7). Ties share their mean rank.
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
    """Return how much accuracy each exit loses when what matters most to one exit is set to zero (Meta-GF, figure 4).

    Of the parameters that all exits read, those with the largest |theta dL_e/dtheta| are what matters most to exit e.

    Args:
        network: a trained network; it is left as it was.
        importance_images, importance_labels: [B, C, H, W] and [B], on which importance is measured.
        images, labels: [N, C, H, W] and [N], on which accuracy is.
        share: of those parameters, how many are set to zero.

    Returns:
        [K, K] in percentage points: row e, what the exits lose when exit e's parameters are gone.
    """
    training = [module for module in network.modules() if module.training]
    asked = [parameter.requires_grad for parameter in network.parameters()]
    network.requires_grad_(True).eval()
    try:
        exits = network.num_exits
        shared = [network.get_parameter(name) for name, readers in owners(network).items() if len(readers) == exits]
        whole = _accuracies(network, images, labels)
        with torch.enable_grad():
            losses = [
                F.cross_entropy(at_least_float32(z), importance_labels) for z in network(importance_images).logits
            ]
            matters = [_importance(loss, shared) for loss in losses]
        originals = [parameter.detach().clone() for parameter in shared]
        damage = []
        for importance in matters:
            count = max(round(share * importance.numel()), 1) if importance.numel() else 0
            gone = torch.zeros_like(importance, dtype=torch.bool)
            gone[importance.topk(count).indices] = True
            pieces = gone.split([parameter.numel() for parameter in shared])
            with torch.no_grad():
                for parameter, piece in zip(shared, pieces, strict=True):
                    parameter.masked_fill_(piece.view_as(parameter), 0.0)
                damage.append(whole - _accuracies(network, images, labels))
                for parameter, original in zip(shared, originals, strict=True):
                    parameter.copy_(original)
        return np.stack(damage)
    finally:
        for module in training:
            module.training = True
        for parameter, wanted in zip(network.parameters(), asked, strict=True):
            parameter.requires_grad_(wanted)


def _importance(loss: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True) if parameters else ()
    each = [(p * g).abs().flatten().detach() for p, g in zip(parameters, gradients, strict=True)]
    return torch.cat(each) if each else torch.empty(0)


@torch.no_grad()
def _accuracies(network: MultiExitNetwork, images: Tensor, labels: Tensor) -> Floats:
    """Return each exit's accuracy in percent, [K]."""
    hits = torch.zeros(network.num_exits, dtype=torch.float64)
    for pictures, truths in zip(images.split(256), labels.split(256), strict=True):
        hits += torch.stack([(z.argmax(1) == truths).sum() for z in network(pictures).logits]).cpu()
    accuracies: Floats = (100 * hits / len(labels)).numpy()
    return accuracies
