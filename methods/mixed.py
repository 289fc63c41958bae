"""Mixed training: first the trunk as an ordinary network, then all exits jointly.

Paper: Kubaty et al., How to Train Your Multi-Exit Model? Analyzing the Impact of Training Strategies, ICML 2025,
https://arxiv.org/abs/2407.14320

The paper combines three phases: 1, trunk and last head on the last exit's loss; 2, all parameters on all exits' losses;
3, the other heads on the frozen trunk. *Disjoint* training is 1 + 3 (`separate` in exitkit), *joint* training is 2, and
*mixed* training, the proposal, is 1 + 2. `shares` are the shares of phases 1 and 2, and `third` is that of phase 3.

What differs from the published code (https://github.com/kamadforge/early-exit-benchmark): it trains on the mean of the
exits' losses instead of their sum, which is `reduction = "mean"`; with SGD without momentum that equals the sum with
lr / K and K times the weight decay. It stops each phase early, by the accuracy on validation images; here the phases
divide the recipe's epochs, by default in halves. It makes the early heads when phase 2 begins; here they exist before,
and phase 1 does not change them or their batch norm. Its phase 3 after a phase 2 does not freeze the trunk, although
that is intended; here it does. Its phases have their own learning rates; here each follows the recipe's schedule with a
new optimiser.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from exitkit.methods.phases import Chosen, split_epochs
from exitkit.strategy import EXIT_WEIGHTS, PHASES, Phase, Run, TrainingStrategy, UserError, setting


@dataclass(eq=False)
class Mixed(TrainingStrategy):
    """Mixed training: a phase for the trunk and the last exit, then a phase for all exits.

    Kubaty et al., ICML 2025, https://arxiv.org/abs/2407.14320

    Phase 1 trains the stages and head K on L_K, phase 2 all parameters on sum_k L_k, for L_k = mean_i CE(z_k,i, y_i),
    logits z_k [B, C] and labels y [B].

    Example:
        >>> [(phase.name, phase.epochs) for phase in exitkit.build_strategy("mixed").phases(epochs=30, exits=4)]
        [('trunk', 15), ('all', 15)]
    """

    slots: ClassVar[frozenset[str]] = frozenset({PHASES, EXIT_WEIGHTS})
    paper: ClassVar[str] = (
        "Kubaty et al., How to Train Your Multi-Exit Model? Analyzing the Impact of Training Strategies, ICML 2025"
    )

    shares: tuple[float, ...] = setting((0.5, 0.5), "shares of the trunk's phase and of the phase of all exits")
    reduction: Literal["sum", "mean"] = setting("sum", "sum of the exits' losses, or their mean (the released code)")
    third: float = setting(0.0, "share of all epochs for a last phase: the early heads on the frozen trunk")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.shares) != 2 or not all(math.isfinite(share) and share >= 0 for share in self.shares):
            raise UserError(f"shares is {self.shares}; expected two numbers of at least 0")
        if not 0 <= self.third < 1:
            raise UserError(f"third is {self.third}; expected a share of at least 0 and below 1")
        if not any(self.shares):
            raise UserError(f"shares is {self.shares}; expected one of them above 0")
        if not self.shares[1] and not self.third:
            raise UserError(f"shares is {self.shares} and third 0: early exits are not trained; expected one above 0")

    def phases(self, epochs: int, exits: int) -> list[Phase]:
        """Return the phases with a share above 0; their total length is `epochs`."""
        last, scale = exits - 1, self._scale(exits)
        trunk, together = (share / sum(self.shares) * (1 - self.third) for share in self.shares)
        heads = tuple(f"heads.{index}." for index in range(last))
        plans = [
            (trunk, Phase("trunk", self._only((last,), 1.0), 0, ("stages.", f"heads.{last}."), "frozen")),
            (together, Phase("all", self._only(tuple(range(exits)), scale), 0)),
            (self.third if heads else 0.0, Phase("heads", self._only(tuple(range(last)), scale), 0, heads, "frozen")),
        ]
        planned = [(share, phase) for share, phase in plans if share]
        lengths = split_epochs(epochs, [share for share, _ in planned], "mixed training")
        return [dataclasses.replace(phase, epochs=length) for length, (_, phase) in zip(lengths, planned, strict=True)]

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Return the weights of the phase of all exits, for steps outside the phases (in a custom loop)."""
        return [self._scale(run.network.num_exits)] * run.network.num_exits

    def _scale(self, exits: int) -> float:
        return 1 / exits if self.reduction == "mean" else 1.0

    def _only(self, exits: tuple[int, ...], weight: float) -> Chosen:
        """Return joint training of these exits, with this method's label smoothing."""
        return Chosen(exits=exits, weight=weight, label_smoothing=self.label_smoothing)
