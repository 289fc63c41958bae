"""Joint training: the weighted sum of all exits' losses, the baseline of every paper.

Paper: Huang et al., Multi-Scale Dense Networks for Resource Efficient Image Classification, ICLR 2018, section 4
("loss functions": sum_k w_k L(f_k), with all w_k = 1), https://arxiv.org/abs/1703.09844
Published code: the same, a sum and not a mean. Nothing differs.

`weights = "sdn"` is the ramp of shallow-deep networks (Kaya et al., ICML 2019, https://arxiv.org/abs/1810.07052): in
epoch t = 1..T internal classifier j has the weight min(C_j, 0.01 + t C_j / T), with C_j = 0.15, 0.30, ... its share of
the cost, and the last exit 1. (Meta-GF's code counts t from 0.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from exitkit.networks import MultiExitNetwork
from exitkit.strategy import EXIT_WEIGHTS, Run, TrainingStrategy, UserError, setting

SDN_SHARES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
"""C_j of the ramp."""


def sdn_ramp(epoch: int, epochs: int, exits: int) -> list[float]:
    """Return the ramp's weight of each exit: min(C_j, 0.01 + epoch C_j / epochs), and 1 for the last."""
    ramp = [min(share, 0.01 + epoch * share / epochs) for share in SDN_SHARES]
    return [*ramp[: exits - 1], 1.0]


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

    weights: tuple[float, ...] | Literal["sdn"] | None = setting(
        None, "one weight per exit, first to last, or the ramp of SDN; none: all 1"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.weights if isinstance(self.weights, tuple) else None
        if given is not None and not (all(math.isfinite(weight) and weight >= 0 for weight in given) and any(given)):
            raise UserError(f"weights is {given}; expected numbers of at least 0, at least one above 0")

    def claims(self) -> frozenset[str]:
        """Claim the exit weights only where they are set, so that `joint+x` is x."""
        return frozenset() if self.weights is None else self.slots

    def adapt(self, network: MultiExitNetwork) -> None:
        """Check that there is one weight per exit."""
        if self.weights == "sdn" and network.num_exits - 1 > len(SDN_SHARES):
            raise UserError(
                f"weights=sdn is for up to {len(SDN_SHARES) + 1} exits; the network has {network.num_exits}"
            )
        if isinstance(self.weights, tuple) and len(self.weights) != network.num_exits:
            raise UserError(f"weights has {len(self.weights)} values; expected {network.num_exits}, one per exit")

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Return the weights, all 1 unless set; of the ramp those of this epoch."""
        if self.weights == "sdn":
            return sdn_ramp(run.position.epoch + 1, run.position.epochs, run.network.num_exits)
        return super().exit_weights(run) if self.weights is None else self.weights
