"""Distillation losses between two classifiers, and adapters for hints between features."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

from torch import Tensor, nn
from torch.nn.functional import log_softmax

from exitkit.networks import Outputs
from exitkit.strategy import Run, at_least_float32


def distillation_losses(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)) of each image, [B], for logits [B, C].

    The factor keeps the gradient's size independent of T (Hinton et al., Distilling the Knowledge in a Neural Network,
    2015, section 2). No gradient reaches the teacher.
    """
    target = log_softmax(at_least_float32(teacher.detach()) / temperature, 1)
    predicted = log_softmax(at_least_float32(student) / temperature, 1)
    # Equal to torch's kl_div, which `vmap` would run for one replica at a time.
    return temperature**2 * (target.exp() * (target - predicted)).sum(1)


def soft_cross_entropies(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return -sum_c softmax(teacher / T)_c log softmax(student / T)_c of each image, [B], for logits [B, C].

    It equals KL(softmax(teacher / T) || softmax(student / T)) plus the teacher's entropy, so that the gradients are
    equal. No gradient reaches the teacher.
    """
    target = (at_least_float32(teacher.detach()) / temperature).softmax(1)
    return -(target * log_softmax(at_least_float32(student) / temperature, 1)).sum(1)


def make_hint_adapters(run: Run, exits: Collection[int]) -> None:
    """Make the side network `hints`: for each of these exits, a linear map A_k to the width of the last exit's feature.

    If the widths are equal, A_k is the identity. The network's optimiser trains the maps.
    """
    widths = run.network.embedding_widths()
    maps = [
        nn.Linear(width, widths[-1]) if index in exits and width != widths[-1] else nn.Identity()
        for index, width in enumerate(widths)
    ]
    run.auxiliary("hints", nn.ModuleList(maps).to(next(run.network.parameters()).dtype))


def adapted_feature(run: Run, outputs: Outputs, index: int) -> Tensor:
    """Return A_k f_k [B, d] for the feature f_k (the flattened embedding) of exit `index`."""
    adapters = cast(nn.ModuleList, run.auxiliaries["hints"].module)
    adapted: Tensor = adapters[index](at_least_float32(outputs.embeddings[index]).flatten(1))
    return adapted
