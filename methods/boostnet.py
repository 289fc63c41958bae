"""BoostNet: exits as the weak learners of an additive model.

Paper: Yu et al., Boosted Dynamic Neural Networks, AAAI 2023, https://arxiv.org/abs/2211.16726

The output of exit n is the sum of its head's logits and the scaled output of the exit before, F_n = z_n + t_n F_{n-1}
(equation 8). Training minimises the cross-entropy of every F_n, with the gradient of F_{n-1} stopped, and rescales
gradients as Gradient Equilibrium does (section "gradient rescaling").

What differs from the published code: it rescales on MSDNet only, and there only the coarsest scale; and it multiplies
F_{n-1} by t_{n-1} in training and by t_n at inference (equal for a constant temperature). `variant = "released"` does
both. A network must be used at the temperature that it was trained with; loading a run restores it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from exitkit.methods.ge import Scope, add_equilibrium
from exitkit.networks import Carry, LogitLink, MultiExitNetwork
from exitkit.strategy import (
    GRADIENT_TAP,
    LOGIT_LINK,
    TrainingStrategy,
    UserError,
    Variant,
    resolve_variant,
    setting,
)


class BoostedLink(LogitLink):
    """F_n = z_n + t_n F_{n-1}, with F_{-1} = 0; the carry is F_n.

    Args:
        temperatures: t_0 .. t_{K-1}, one per exit (t_0 is not used).
        stop_gradient: whether the gradient of F_{n-1} is stopped in exit n's loss.
        shifted: whether to use t_{n-1} in training, as the released code does.
    """

    def __init__(self, temperatures: tuple[float, ...], stop_gradient: bool, shifted: bool) -> None:
        super().__init__()
        self.config = (temperatures, stop_gradient, shifted)
        self.temperatures = temperatures
        self.stop_gradient = stop_gradient
        self.shifted = shifted

    def forward(self, index: int, raw: Tensor, embedding: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """Return F_n [B, C] twice: as the exit's output, and as the carry for the next exit."""
        if index == 0:
            return raw, raw
        temperature = self.temperatures[index - 1 if self.shifted and self.training else index]
        earlier = carry.detach() if self.stop_gradient else carry
        boosted = raw + temperature * earlier
        return boosted, boosted


@dataclass(eq=False)
class BoostNet(TrainingStrategy):
    """BoostNet: every exit corrects the scaled output of the exit before it; gradients are rescaled.

    Yu et al., AAAI 2023, https://arxiv.org/abs/2211.16726

    F_n = z_n + t_n stopgrad(F_{n-1}), L = sum_n mean_i CE(F_n,i, y_i), for the heads' logits z_n [B, C] and labels
    y [B].

    Example:
        >>> strategy = exitkit.build_strategy("boostnet", temperature=0.5)
        >>> sorted(strategy.claims())
        ['gradient tap', 'logit link']
    """

    slots: ClassVar[frozenset[str]] = frozenset({GRADIENT_TAP, LOGIT_LINK})
    paper: ClassVar[str] = "Yu et al., Boosted Dynamic Neural Networks, AAAI 2023"

    variant: Variant = setting("paper", "follow the paper's equations or the released code")
    temperature: float | tuple[float, ...] = setting(
        0.5,
        "t, factor of the output of the exit before: one number, or one per exit (0: independent exits, 1: boosting)",
        search=(0.0, 1.0),
    )
    stop_gradient: bool = setting(True, "stop the gradient of the output of the exit before")
    rescale: bool = setting(True, "rescale gradients as Gradient Equilibrium does")
    ge_scope: Scope | None = setting(
        None,
        "scales of MSDNet that are rescaled",
        variant={"paper": "all", "released": "coarsest"},
        needs={"rescale": (True,)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)
        values = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        if not values or not all(math.isfinite(value) and value >= 0 for value in values):
            raise UserError(f"temperature is {self.temperature}; expected numbers of at least 0 (the paper's is 0.5)")

    def claims(self) -> frozenset[str]:
        """Claim the gradient tap only if gradients are rescaled."""
        return self.slots if self.rescale else frozenset({LOGIT_LINK})

    def adapt(self, network: MultiExitNetwork) -> None:
        """Set the boosted link and, if gradients are rescaled, the gradient tap."""
        exits = network.num_exits
        temperatures = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,) * exits
        if len(temperatures) != exits:
            raise UserError(f"temperature has {len(temperatures)} values; expected one, or {exits} (one per exit)")
        network.set_link(BoostedLink(temperatures, self.stop_gradient, shifted=self.variant == "released"))
        if self.rescale:
            assert self.ge_scope is not None  # set by the variant
            if self.variant == "released" and network.family == "ranet":
                raise UserError(
                    "the released code of BoostNet does not rescale gradients on ranet networks; expected "
                    "rescale=false, or variant=paper"
                )
            add_equilibrium(network, self.ge_scope, self.variant)
