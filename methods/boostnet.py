"""BoostNet: exits as the weak learners of an additive model.

Paper: Yu et al., Boosted Dynamic Neural Networks, AAAI 2023, https://arxiv.org/abs/2211.16726

Exit n's output is the weakened sum of all exits so far, F_n = z_n + t_n F_{n-1} (equation 8), trained by the
cross-entropy of every F_n with F_{n-1} held fixed (its gradient stopped), and with gradient rescaling as in Gradient
Equilibrium (section "gradient rescaling").

What differs from the published code: it rescales on MSDNet only, and there only the coarsest scale; and in training it
weakens F_{n-1} by t_{n-1}, at inference by t_n (the same for a constant temperature). `variant = "released"` follows
it in both. A network trained at one temperature must be used at that temperature: ours comes back with the run.
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
    """F_n = z_n + t_n F_{n-1}, with F_{-1} = 0; carries F_n on.

    Args:
        temperatures: t_0 .. t_{K-1}, one per exit (t_0 is not used).
        stop_gradient: whether F_{n-1} is held fixed in exit n's loss.
        shifted: use t_{n-1} while training, as the released code does.
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
    """BoostNet: every exit corrects the weakened sum of the exits before it, with rescaled gradients.

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
        "t, the weight of the earlier exits' sum: one number, or one per exit (0: plain exits, 1: plain boosting)",
    )
    stop_gradient: bool = setting(True, "hold the earlier exits' sum fixed in each exit's loss")
    rescale: bool = setting(True, "rescale gradients as Gradient Equilibrium does")
    ge_scope: Scope | None = setting(
        None, "which onward tensors are rescaled", variant={"paper": "all", "released": "coarsest"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)
        values = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        if not values or not all(math.isfinite(value) and value >= 0 for value in values):
            raise UserError(f"temperature is {self.temperature}; expected numbers of at least 0 (the paper's is 0.5)")

    def claims(self) -> frozenset[str]:
        """Claim the tap only where gradients are rescaled."""
        return self.slots if self.rescale else frozenset({LOGIT_LINK})

    def adapt(self, network: MultiExitNetwork) -> None:
        """Set the boosted link and, unless it is off, the rescalings."""
        exits = network.num_exits
        given = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,) * exits
        if len(given) != exits:
            raise UserError(f"temperature has {len(given)} values; expected one, or {exits} (one per exit)")
        network.set_link(BoostedLink(given, self.stop_gradient, shifted=self.variant == "released"))
        if self.rescale:
            assert self.ge_scope is not None  # set by the variant
            add_equilibrium(network, self.ge_scope, self.variant)
