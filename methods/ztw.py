"""Zero Time Waste: each early exit of a frozen network also reads the logits of the exit before it.

Paper: Wolczyk et al., Zero Time Waste: Recycling Predictions in Early Exit Neural Networks, NeurIPS 2021,
https://arxiv.org/abs/2106.05409

First the trunk and the last head are trained as an ordinary network. Then both are frozen, and the early heads are
trained with new classifiers, each of which reads the logits of the one before. With exits k = 0..K-1 and the feature
f_k [B, d_k] of head k,

    y_0 = W_0 f_0 + b_0,   y_k = W_k [f_k; N(sg y_{k-1})] + b_k  for 0 < k < K-1,   y_{K-1} = the last head's own logits

where sg stops the gradient, and N is the identity, or layer normalisation if there are many classes. The loss of the
second phase is the sum of the early exits' cross-entropies. No two exits train the same parameters in a phase, so that
there are no gradients to combine, and the method can't be composed with methods that claim the update.

What differs from the published code (https://github.com/gmum/Zero-Time-Waste): its early heads are made for the second
phase and have the same structure; here they are those of the network, which the first phase does not change. Its second
phase has 50 epochs for 100 of the first (`ratio=0.5`) and its own steps of the learning rate; here it follows the
recipe's schedule, from the published rate 1e-3 of Adam. The paper then combines the outputs of all exits up to the
current one, by weights that are fitted after training; that is not part of this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from exitkit.methods.phases import Chosen
from exitkit.networks import Carry, LogitLink, MultiExitNetwork
from exitkit.strategy import EXIT_WEIGHTS, LOGIT_LINK, PHASES, UPDATE, Phase, TrainingStrategy, UserError, setting

MANY_CLASSES = 200
"""Largest number of classes without layer normalisation; the published code uses it on ImageNet only."""


class CascadeLink(LogitLink):
    """Computes y_k from the feature f_k and the logits y_{k-1}; the last exit outputs its head's own logits.

    Args:
        widths: d_k, the width of each exit's feature.
        classes: C.
        normalise: whether N is layer normalisation.
    """

    def __init__(self, widths: Sequence[int], classes: int, normalise: bool) -> None:
        super().__init__()
        self.config = (tuple(widths), classes, normalise)
        early = widths[:-1]
        self.answers = nn.ModuleList(nn.Linear(width + classes * (k > 0), classes) for k, width in enumerate(early))
        self.norms = nn.ModuleList(nn.LayerNorm(classes) if normalise else nn.Identity() for _ in early[1:])

    def forward(self, index: int, raw: Tensor, embedding: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """Return y_k [B, C] twice: as the exit's output, and as the carry for the next exit."""
        if index == len(self.answers):
            return raw, raw
        feature = embedding.flatten(1)
        if index:
            feature = torch.cat([feature, self.norms[index - 1](carry.detach())], 1)
        logits = self.answers[index](feature)
        return logits, logits


@dataclass(eq=False)
class ZeroTimeWaste(TrainingStrategy):
    """Zero Time Waste: a trained network, frozen, and early exits that read the logits of the exit before.

    Wolczyk et al., NeurIPS 2021, https://arxiv.org/abs/2106.05409

    Phase 1 trains the trunk on the last exit. Phase 2 trains the early exits, y_k [B, C] = W_k [f_k; sg y_{k-1}] + b_k
    for features f_k [B, d_k], on the sum of their mean cross-entropies.

    Example:
        >>> [(phase.name, phase.optimizer) for phase in exitkit.build_strategy("ztw").phases(epochs=100, exits=4)]
        [('trunk', None), ('heads', 'adam')]
    """

    slots: ClassVar[frozenset[str]] = frozenset({PHASES, LOGIT_LINK, EXIT_WEIGHTS, UPDATE})
    yields: ClassVar[frozenset[str]] = frozenset({PHASES})
    paper: ClassVar[str] = (
        "Wolczyk et al., Zero Time Waste: Recycling Predictions in Early Exit Neural Networks, NeurIPS 2021"
    )

    ratio: float = setting(0.5, "length of the second phase, as a multiple of the first")
    heads_lr: float = setting(1e-3, "learning rate of the second phase (Adam)")
    normalise: bool | None = setting(
        None, "layer normalisation of the logits that an exit reads; none: with more than 200 classes, as published"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ratio", "heads_lr"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name} is {getattr(self, name)}; expected above 0")

    def unused_settings(self, yielded: frozenset[str] = frozenset()) -> dict[str, str]:
        """Return the settings of the phases, if another method has them."""
        needed = "the phases of ztw, which another method replaces"
        own = dict.fromkeys(("ratio", "heads_lr"), needed) if PHASES in yielded else {}
        return super().unused_settings(yielded) | own

    def adapt(self, network: MultiExitNetwork) -> None:
        """Set the link, with the new classifiers."""
        many = network.num_classes > MANY_CLASSES
        normalise = many if self.normalise is None else self.normalise
        link = CascadeLink(network.embedding_widths(), network.num_classes, normalise)
        network.set_link(link.to(next(network.parameters())))

    def phases(self, epochs: int, exits: int) -> list[Phase]:
        """Return the training of the trunk, and that of the early exits on it."""
        last = exits - 1
        smoothing = self.label_smoothing
        trunk = Chosen(exits=(last,), label_smoothing=smoothing)
        phases = [Phase("trunk", trunk, epochs, ("stages.", f"heads.{last}."), batchnorm="frozen")]
        if last:
            trained = ("link.", *(f"heads.{index}.embed." for index in range(last)))
            length = max(round(self.ratio * epochs), 1)
            phases.append(Phase("heads", self, length, trained, batchnorm="frozen", lr=self.heads_lr, optimizer="adam"))
        return phases
