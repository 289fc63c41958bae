"""Joint training: the weighted sum of all exits' losses, the baseline of every paper.

Paper: Huang et al., Multi-Scale Dense Networks for Resource Efficient Image Classification, ICLR 2018, section 4
("loss functions": sum_k w_k L(f_k), with all w_k = 1), https://arxiv.org/abs/1703.09844
Published code: the same, a sum and not a mean. Nothing differs.

`weights = "sdn"` is the ramp of shallow-deep networks (Kaya et al., ICML 2019, https://arxiv.org/abs/1810.07052): in
epoch t = 1..T internal classifier j has the weight min(C_j, 0.01 + t C_j / T), with C_j = 0.15, 0.30, ... its share of
the cost, and the last exit 1. (Meta-GF's code counts t from 0.)

The other names are fixed weights, with exits k = 0..K-1; `--set weights=NAME` selects one. They come from other papers'
code: `linear` from https://github.com/lancopku/Early-Exit, `half` (also that of https://github.com/gmum/Zero-Time-Waste),
`rise` and `sieve` from https://github.com/EchoWho/AnytimeNeuralNetwork_public, `warm` from
https://github.com/networkslab/dynn; `flops` is an addition. Their sums differ, and so does the effective learning rate.

    uniform  1                   mean  1/K                       last  0, ..., 0, 1
    linear   2(k+1) / (K(K+1))   rise  1/4 to 1 in equal steps   half  1/(K-1), and 1 for the last exit
    warm     K-k                 flops K C_k / sum_j C_j, with C_k the multiply-adds up to exit k
    sieve    n_k / sum_j n_j, and 1 for the last exit; n_k counts the powers of two below K that divide K-1-k
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from exitkit.escaping import counted
from exitkit.networks import MultiExitNetwork, cost
from exitkit.strategy import EXIT_WEIGHTS, Run, TrainingStrategy, UserError, setting

SDN_SHARES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
"""C_j of the ramp."""

FixedWeights = Literal["uniform", "mean", "linear", "rise", "flops", "last", "half", "warm", "sieve"]

# The weight of exit k of K; `flops` and `sieve` also depend on other exits and are made from shares.
_FORMULAS: dict[str, Callable[[int, int], float]] = {
    "uniform": lambda k, exits: 1.0,
    "mean": lambda k, exits: 1 / exits,
    "linear": lambda k, exits: 2 * (k + 1) / (exits * (exits + 1)),
    "rise": lambda k, exits: 1.0 if exits == 1 else 0.25 + 0.75 * k / (exits - 1),
    "last": lambda k, exits: float(k == exits - 1),
    "half": lambda k, exits: 1.0 if k == exits - 1 else 1 / (exits - 1),
    "warm": lambda k, exits: float(exits - k),
}


def sdn_ramp(epoch: int, epochs: int, exits: int) -> list[float]:
    """Return the ramp's weight of each exit: min(C_j, 0.01 + epoch C_j / epochs), and 1 for the last."""
    ramp = [min(share, 0.01 + epoch * share / epochs) for share in SDN_SHARES]
    return [*ramp[: exits - 1], 1.0]


def fixed_weights(name: FixedWeights, network: MultiExitNetwork) -> list[float]:
    """Return the weights of a name, one per exit; see the module for the formulas."""
    exits = network.num_exits
    if name == "flops":
        costs = [row.macs for row in cost(network)]
        return [exits * macs / sum(costs) for macs in costs]
    if name == "sieve":
        strides = [2**power for power in range(exits) if 2**power < exits]
        hits = [sum(distance % stride == 0 for stride in strides) for distance in range(exits - 1, 0, -1)]
        return [*(count / sum(hits) for count in hits), 1.0]
    return [_FORMULAS[name](index, exits) for index in range(exits)]


@dataclass(eq=False)
class Joint(TrainingStrategy):
    """Joint training: all exits' cross-entropies summed, every exit with the same or a given weight.

    Huang et al., ICLR 2018, https://arxiv.org/abs/1703.09844

    L = sum_{k=1..K} w_k mean_i CE(z_k,i, y_i), for logits z_k [B, C] and labels y [B].

    Example:
        >>> exitkit.build_strategy("joint", weights="0.5,0.5,1,1").weights
        (0.5, 0.5, 1.0, 1.0)
    """

    slots: ClassVar[frozenset[str]] = frozenset({EXIT_WEIGHTS})
    paper: ClassVar[str] = (
        "Huang et al., Multi-Scale Dense Networks for Resource Efficient Image Classification, ICLR 2018"
    )

    weights: tuple[float, ...] | Literal["sdn"] | FixedWeights | None = setting(
        None, "one weight per exit, first to last, or the name of weights (sdn: the ramp of SDN); none: all 1"
    )

    _fixed: list[float] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = self.weights if isinstance(self.weights, tuple) else None
        if numbers is not None and not (
            all(math.isfinite(weight) and weight >= 0 for weight in numbers) and any(numbers)
        ):
            raise UserError(f"weights is {numbers}; expected numbers of at least 0, at least one above 0")

    def claims(self) -> frozenset[str]:
        """Claim the exit weights only if they are set, so that `joint+x` equals x."""
        return frozenset() if self.weights is None else self.slots

    def adapt(self, network: MultiExitNetwork) -> None:
        """Check that there is one weight per exit."""
        if self.weights == "sdn" and network.num_exits - 1 > len(SDN_SHARES):
            raise UserError(
                f"weights=sdn is for up to {len(SDN_SHARES) + 1} exits; the network has {network.num_exits}"
            )
        if isinstance(self.weights, tuple) and len(self.weights) != network.num_exits:
            raise UserError(
                f"weights has {counted(len(self.weights), 'value')}; expected {network.num_exits}, one per exit"
            )

    def prepare(self, run: Run) -> None:
        """Compute the weights of a name, for which the network must be complete."""
        if isinstance(self.weights, str) and self.weights != "sdn":
            self._fixed = fixed_weights(self.weights, run.network)

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Return the weights: all 1 by default, and for the ramp those of this epoch."""
        if self.weights == "sdn":
            return sdn_ramp(run.position.epoch + 1, run.position.epochs, run.network.num_exits)
        if isinstance(self.weights, tuple):
            return self.weights
        return super().exit_weights(run) if self._fixed is None else self._fixed
