"""Separate training: every parameter is trained on one exit's loss only; two simple alternatives to joint training.

Paper: none of its own; Scardapane et al., Why Should We Add Early Exits to Neural Networks?, Cognitive Computation
2020, https://arxiv.org/abs/2004.12814, reviews both besides joint training.

- `classifier`: the trunk and the last head are trained as an ordinary network; then the trunk is frozen, and all other
  heads are trained on it.
- `branch`: for k = 1..K, stage k and head k are trained on exit k's loss, with all earlier parts frozen.

There is no published code, so that nothing is known to differ. The sources do not specify the following: here the
epochs are split equally among the phases (or by `shares`), every phase has a new optimiser and its own schedule, and
frozen parts are in evaluation mode. Every phase runs the whole network forward, also stages that it does not train.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from exitkit.escaping import counted
from exitkit.methods.phases import Chosen, split_epochs
from exitkit.strategy import EXIT_WEIGHTS, PHASES, Phase, TrainingStrategy, UserError, setting


@dataclass(eq=False)
class Separate(TrainingStrategy):
    """Separate training: the trunk on the last exit's loss, then the other heads; or one branch after the other.

    Reviewed in Scardapane et al., Cognitive Computation 2020, https://arxiv.org/abs/2004.12814

    Phase k trains the parameters theta_k on L_k = mean_i CE(z_k,i, y_i), for logits z_k [B, C] and labels y [B]; all
    others are frozen.

    Example:
        >>> [phase.name for phase in exitkit.build_strategy("separate").phases(epochs=30, exits=4)]
        ['trunk', 'heads']
    """

    slots: ClassVar[frozenset[str]] = frozenset({PHASES, EXIT_WEIGHTS})
    paper: ClassVar[str] = "reviewed in Scardapane et al., Cognitive Computation 2020; no paper of its own"

    order: Literal["classifier", "branch"] = setting(
        "classifier", "trunk and last head, then the other heads; or stage by stage, each with its head"
    )
    shares: tuple[float, ...] | None = setting(None, "share of the epochs per phase; none: equal shares")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shares is not None and not all(math.isfinite(share) and share > 0 for share in self.shares):
            raise UserError(f"shares is {self.shares}; expected numbers above 0")

    def phases(self, epochs: int, exits: int) -> list[Phase]:
        """Return the phases; their total length is `epochs`, so that the cost is at most that of joint training."""
        last = exits - 1
        plans: list[tuple[str, tuple[int, ...], tuple[str, ...]]]
        if self.order == "branch":
            plans = [(f"branch {k + 1}", (k,), (f"stages.{k}.", f"heads.{k}.")) for k in range(exits)]
        else:
            plans = [("trunk", (last,), ("stages.", f"heads.{last}."))]
            others = tuple(range(last))
            if others:
                plans.append(("heads", others, tuple(f"heads.{index}." for index in others)))
        lengths = self._lengths(epochs, len(plans))
        return [
            Phase(name, self._only(chosen), length, train=trained, batchnorm="frozen")
            for (name, chosen, trained), length in zip(plans, lengths, strict=True)
        ]

    def _only(self, exits: tuple[int, ...]) -> Chosen:
        """Return joint training of these exits, with this method's label smoothing."""
        return Chosen(exits=exits, label_smoothing=self.label_smoothing)

    def _lengths(self, epochs: int, count: int) -> list[int]:
        """Return the number of epochs of each phase."""
        shares = self.shares or (1.0,) * count
        if len(shares) != count:
            raise UserError(f"shares has {counted(len(shares), 'value')}; expected {count}, one per phase")
        return split_epochs(epochs, shares, "separate training")
