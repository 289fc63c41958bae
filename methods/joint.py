"""Joint training: the weighted sum of all exits' losses, the baseline of every paper.

Paper: Huang et al., Multi-Scale Dense Networks for Resource Efficient Image Classification, ICLR 2018, section 4
("loss functions": sum_k w_k L(f_k), with all w_k = 1).
Published code: the same, a sum and not a mean. Nothing differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from exitkit.errors import UserError
from exitkit.plugins import setting
from exitkit.strategy import EXIT_WEIGHTS, TrainingStrategy

if TYPE_CHECKING:
    from exitkit.network import MultiExitNetwork
    from exitkit.run import Run


@dataclass(eq=False)
class Joint(TrainingStrategy):
    """Joint training: all exits' cross-entropies summed, every exit with the same or a given weight."""

    slots: ClassVar[frozenset[str]] = frozenset({EXIT_WEIGHTS})
    paper: ClassVar[str] = (
        "Huang et al., Multi-Scale Dense Networks for Resource Efficient Image Classification, ICLR 2018"
    )

    weights: tuple[float, ...] | None = setting(None, "one weight an exit, first to last; none: all 1")

    def __post_init__(self) -> None:
        given = self.weights
        if given is not None and not (all(math.isfinite(weight) and weight >= 0 for weight in given) and any(given)):
            raise UserError(f"weights is {given}; expected numbers of at least 0, at least one above 0")

    def claims(self) -> frozenset[str]:
        """Claim the exit weights only where they are set, so that `joint+x` is x."""
        return frozenset() if self.weights is None else self.slots

    def adapt(self, network: MultiExitNetwork) -> None:
        """Check that there is a weight an exit."""
        if self.weights is not None and len(self.weights) != network.num_exits:
            raise UserError(f"weights has {len(self.weights)} values; expected {network.num_exits}, one an exit")

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Return the weights, all 1 unless set."""
        return super().exit_weights(run) if self.weights is None else self.weights
