"""Confidence-gated training: an image trains later exits less if an earlier exit classifies it correctly.

Paper: Mokssit et al., Confidence-Gated Training for Efficient Early-Exit Neural Networks, arXiv 2025,
https://arxiv.org/abs/2509.17885

With exits k = 0..K-1, image i, probabilities p_k [B, C] and losses l_k [B],

    u_i0 = 1,  u_ik = prod_{j<k} g_ij
    hard:  g_ij = 0 if exit j predicts the label with max p_j >= tau, else 1
    soft:  g_ij = 1 - sigmoid(s (p_j(label) - tau))
    W_ik = lambda_k u_ik + eps, divided by its sum over the exits,   L = sum_k mean_i W_ik l_ik

and no gradient passes through g. The paper's lambda_k are all 1. The weights of an image sum to 1, so that losses have
1/K of the scale of joint training; `scale=exits` multiplies them by K. Other methods' exit weights multiply
lambda_k u_ik + eps.

What differs from the published code (https://github.com/gunki-geek/CG-Training), which `variant = "released"` follows:
it changes lambda over the epochs from (1, .7, .4, .1) to (.2, .5, .8, 1), with the same tau and eps as here; for other
numbers of exits the values are equally spaced between the first and the last of these. It also smooths labels by 0.1,
which the variant does not set (`label_smoothing=0.1` does). With its s = 1 and tau = 0.9 a soft gate is between 0.475
and 0.711 for any image, so that the default is the hard gate; `sharpness=10` makes the soft gate depend on the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from exitkit.networks import Outputs
from exitkit.strategy import (
    UPDATE,
    Batch,
    Run,
    TrainingStrategy,
    UserError,
    Variant,
    at_least_float32,
    resolve_variant,
    setting,
    weighted_sum,
)

START, END = (1.0, 0.7, 0.4, 0.1), (0.2, 0.5, 0.8, 1.0)
"""lambda of the released code's four exits, in the first epoch and in the last."""


@dataclass(eq=False)
class ConfidenceGated(TrainingStrategy):
    """Confidence-gated training: an image has less weight after an exit that is right and confident.

    Mokssit et al., 2025, https://arxiv.org/abs/2509.17885

    L = sum_k mean_i W_ik l_ik, for losses l [B, K] and weights W [B, K] that are proportional to
    lambda_k prod_{j<k} g_ij + eps and sum to 1 for each image, with gates g [B, K].

    Example:
        >>> exitkit.build_strategy("cgt", gate="soft").threshold
        0.9
    """

    slots: ClassVar[frozenset[str]] = frozenset({UPDATE})
    paper: ClassVar[str] = (
        "Mokssit et al., Confidence-Gated Training for Efficient Early-Exit Neural Networks, arXiv 2025"
    )

    variant: Variant = setting("paper", "follow the paper's equations or the released code")
    gate: Literal["hard", "soft"] = setting("hard", "an image passes an exit or not, or by a sigmoid of p(label)")
    threshold: float | None = setting(None, "tau, the confidence that closes a gate; none: 0.5 (hard), 0.9 (soft)")
    sharpness: float = setting(
        1.0, "s, the slope of the soft gate", search=(0.5, 20.0, "log"), needs={"gate": ("soft",)}
    )
    epsilon: float = setting(1e-3, "weight that is added for every image at every exit")
    exit_share: Literal["constant", "moving"] | None = setting(
        None,
        "lambda: all 1, or changing from early to late exits over the epochs",
        variant={"paper": "constant", "released": "moving"},
    )
    scale: Literal["one", "exits"] = setting(
        "one", "sum of an image's weights: 1, or the number of exits as in joint training"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)
        if self.threshold is None:
            self.threshold = 0.5 if self.gate == "hard" else 0.9
        if not (self.threshold >= 0 and math.isfinite(self.threshold)):
            raise UserError(f"threshold is {self.threshold}; expected a number of at least 0")
        if not (self.sharpness > 0 and math.isfinite(self.sharpness)):
            raise UserError(f"sharpness is {self.sharpness}; expected above 0")
        if not (self.epsilon >= 0 and math.isfinite(self.epsilon)):
            raise UserError(f"epsilon is {self.epsilon}; expected a number of at least 0")

    def refuses(self) -> Mapping[str, str]:
        """Refuse mixed images: the gates need one label per image."""
        return dict.fromkeys(("mixup", "cutmix"), "its gates need one label per image")

    def train_step(self, run: Run, batch: Batch) -> None:
        """Make a step on the losses, weighted by the gates of each image."""
        losses, outputs = run.losses_and_outputs(batch)
        weights = self._weights(run, outputs, batch[1])
        scale = run.network.num_exits if self.scale == "exits" else 1
        gated = [column * loss for column, loss in zip(weights.unbind(1), losses, strict=True)]
        run.step(weighted_sum(gated, [scale * (weight != 0) for weight in run.weights()]), batch)

    def sample_weights(self, run: Run, losses: Sequence[Tensor], outputs: Outputs) -> Tensor | None:
        """Return W [B, K] for the run's batch, or None if it has no batch."""
        return None if run.batch is None else self._weights(run, outputs, run.batch.labels)

    @torch.no_grad()
    def _weights(self, run: Run, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return W [B, K] for labels [B]."""
        gates = torch.stack([self._gate(logits, labels) for logits in outputs.logits], 1)
        passed = torch.cat([torch.ones_like(gates[:, :1]), gates.cumprod(1)[:, :-1]], 1)
        weights = (passed * passed.new_tensor(self._exit_shares(run)) + self.epsilon) * passed.new_tensor(
            list(run.weights())
        )
        return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)

    def _gate(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return g [B] of an exit from its logits [B, C]."""
        probabilities = at_least_float32(logits).softmax(1)
        assert self.threshold is not None  # set on construction
        if self.gate == "soft":
            of_label = probabilities.gather(1, labels[:, None]).squeeze(1)
            return 1 - torch.sigmoid(self.sharpness * (of_label - self.threshold))
        confidence, predicted = probabilities.max(1)
        return 1 - ((predicted == labels) & (confidence >= self.threshold)).to(probabilities.dtype)

    def _exit_shares(self, run: Run) -> list[float]:
        """Return lambda of every exit in this epoch."""
        exits = run.network.num_exits
        if self.exit_share == "constant":
            return [1.0] * exits
        done = run.position.epoch / max(run.position.epochs - 1, 1)
        pairs = zip(_spread(START, exits), _spread(END, exits), strict=True)
        return [(1 - done) * first + done * last for first, last in pairs]


def _spread(published: Sequence[float], exits: int) -> Sequence[float]:
    """Return the published values for four exits, for others equally spaced ones from the first to the last of them."""
    if exits == len(published):
        return published
    spread: list[float] = torch.linspace(published[0], published[-1], exits, dtype=torch.float64).tolist()
    return spread
