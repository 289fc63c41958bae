"""AdaLoss: each exit's loss is weighted by the inverse of its running mean.

Paper: Hu et al., Learning Anytime Predictions in Neural Networks via Adaptive Loss Balancing, AAAI 2019,
https://ojs.aaai.org/index.php/AAAI/article/view/4268

With exits k = 0..K-1 and L_k the mean loss of exit k in a batch, every step updates m_k <- mu m_k + (1 - mu) L_k, and
every `period` steps the weights w [K] are computed from m [K]:

    w = 1/m + 1e-8,  w <- w / max w,  w_{K-1} <- w_{K-1} + extra,  w <- w / max w,  w <- (1 - gamma) w + gamma

For gamma = 0 the step follows the gradient of the geometric mean of the losses, up to its length; gamma = 1 is joint
training. The weights are 1 until they are computed for the first time; those of a step depend on earlier steps only.

What differs from the published code (https://github.com/EchoWho/AnytimeNeuralNetwork_public): it also scales the weight
decay of each exit's linear layer by a constant, and can weight by the norms of gradients instead of losses; neither is
done here. Its settings are the defaults; its CIFAR-100 script for MSDNet uses `period=1` and `final_extra=1`. The
running means are averaged over the ranks, start again in each phase, and exclude losses that are not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from exitkit.strategy import EXIT_WEIGHTS, Batch, LearnedTable, Run, TrainingStrategy, UserError, setting


@dataclass(eq=False)
class AdaLoss(TrainingStrategy):
    """AdaLoss: weights of the exits that are inversely proportional to the running means of their losses.

    Hu et al., AAAI 2019, https://ojs.aaai.org/index.php/AAAI/article/view/4268

    L = sum_k w_k L_k, where w [K] is 1/m [K], scaled to a maximum of 1 and mixed with 1 by the share gamma, and m is
    the moving average of the batch means L_k.

    Example:
        >>> exitkit.build_strategy("adaloss", period=1, final_extra=1.0).gamma
        0.07
    """

    slots: ClassVar[frozenset[str]] = frozenset({EXIT_WEIGHTS})
    paper: ClassVar[str] = (
        "Hu et al., Learning Anytime Predictions in Neural Networks via Adaptive Loss Balancing, AAAI 2019"
    )

    ema: float = setting(0.9, "mu, weight of the previous running mean in a step")
    gamma: float = setting(0.07, "share of equal weights in the weights", search=(0.0, 0.5))
    period: int = setting(100, "steps between two computations of the weights", search=(1, 200, "log"))
    final_extra: float = setting(0.0, "added to the last exit's weight, where the largest is 1")

    _means: Tensor | None = field(default=None, init=False, repr=False)
    _weights: list[float] | None = field(default=None, init=False, repr=False)
    _steps: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema < 1:
            raise UserError(f"ema is {self.ema}; expected a share of at least 0 and below 1")
        if not 0 <= self.gamma <= 1:
            raise UserError(f"gamma is {self.gamma}; expected a share between 0 and 1")
        if self.period < 1:
            raise UserError(f"period is {self.period}; expected at least 1")
        if not 0 <= self.final_extra < float("inf"):
            raise UserError(f"final_extra is {self.final_extra}; expected a number of at least 0")

    def prepare(self, run: Run) -> None:
        """Reset the weights and the running means."""
        self._means, self._weights, self._steps = None, None, 0

    def observe(self, run: Run, losses: Sequence[Tensor], batch: Batch) -> None:
        """Update the weights every `period` steps, and then the running means by the losses of this batch."""
        if self._means is not None and self._steps % self.period == 0:
            self._weights = balanced(self._means, self.gamma, self.final_extra).nan_to_num(nan=1.0).tolist()
        means = run.mean(torch.stack([loss.mean() for loss in losses]), batch)
        # Chosen on the device, since reading a value from a GPU in every step would wait for it. NaN: none yet.
        before = torch.full_like(means, torch.nan) if self._means is None else self._means
        after = torch.where(before.isnan(), means, self.ema * before + (1 - self.ema) * means)
        self._means = torch.where(after.isfinite().all(), after, before)
        self._steps += 1

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Return the last computed weights."""
        return super().exit_weights(run) if self._weights is None else self._weights

    def learned(self, run: Run) -> list[LearnedTable]:
        """Return the weights of the exits."""
        exits = [f"exit {number}" for number in range(1, run.network.num_exits + 1)]
        return [LearnedTable("weights of the exits", ["weight"], exits, [list(self.exit_weights(run))])]

    def state_dict(self) -> dict[str, Any]:
        """Return the running means, the weights and the number of steps."""
        return {"means": self._means, "weights": self._weights, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore this state."""
        self._means, self._weights, self._steps = state["means"], state["weights"], state["steps"]


def balanced(means: Tensor, gamma: float, final_extra: float) -> Tensor:
    """Return the weights [K] for running means [K], all between gamma and 1."""
    weights = 1 / means.clamp(min=torch.finfo(means.dtype).tiny) + 1e-8
    weights = weights / weights.max()
    weights[-1] += final_extra
    return (1 - gamma) * weights / weights.max() + gamma
