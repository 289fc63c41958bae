"""Gradient Equilibrium: every exit pulls on the trunk with the same strength.

Paper: Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019, section 3.2, equations 4 and 5.
With exits k = 0..K-1: on the branch into head k the gradient is multiplied by 1/(K-k), on the branch onward by
(K-k-1)/(K-k). Every exit's gradient then reaches stage k with the factor 1/(K-k), and heads keep their own gradient.

What differs from the published code. On MSDNet it rescales only the coarsest scale, which gives the factors of
equation 5 only along paths that never leave that scale; `ge_scope = "coarsest"` (`variant = "released"`) does the same.
`ge_scope = "all"`, the default, rescales every tensor handed on, and equation 5 then holds for every parameter.
On VGG and ResNet with internal classifiers (Meta-GF's code) it multiplies by 1/(K-k) at the *input* of the unit that
bears exit k and by K-k-1 at its output, so that these units feel the plain sum of their exits' gradients while all
others feel equation 5; `variant = "released"` does so there. The released WideResNet counts units where it means exits
(factors of zero, and negative ones), RANet and MobileNet have no released form: none of these is reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from exitkit.errors import UserError
from exitkit.gradients import rescale
from exitkit.network import GradientTap, MultiExitNetwork, State, map_tensors
from exitkit.plugins import resolve_variant, setting
from exitkit.strategy import GRADIENT_TAP, TrainingStrategy, Variant

Scope = Literal["all", "coarsest"]


@dataclass(frozen=True)
class EquilibriumTap(GradientTap):
    """The two rescalings of equation 4 at every boundary.

    `scope` says which onward tensors are rescaled: `all`, or only the `coarsest` (the one that the head reads).
    """

    scope: Scope = "all"

    def to_head(self, network: MultiExitNetwork, index: int, view: Tensor) -> Tensor:
        """Multiply what flows back from head `index` by 1/(K-k)."""
        return rescale(view, 1 / (network.num_exits - index))

    def onward(self, network: MultiExitNetwork, index: int, state: State) -> State:
        """Multiply what flows back from the later stages by (K-k-1)/(K-k)."""
        remaining = network.num_exits - index
        factor = (remaining - 1) / remaining
        if self.scope == "coarsest":
            return network.with_view(state, rescale(network.view(state), factor))
        return map_tensors(lambda tensor: rescale(tensor, factor), state)


@dataclass(frozen=True)
class ReleasedChainTap(GradientTap):
    """The rescalings of Meta-GF's code for internal classifiers: around the unit that bears the exit."""

    def into_last_unit(self, network: MultiExitNetwork, index: int, state: State) -> State:
        """Multiply what flows back from the exit-bearing unit by 1/(K-k)."""
        if index == network.num_exits - 1:
            return state
        return map_tensors(lambda tensor: rescale(tensor, 1 / (network.num_exits - index)), state)

    def onward(self, network: MultiExitNetwork, index: int, state: State) -> State:
        """Multiply what flows back from the later stages by K-k-1."""
        return map_tensors(lambda tensor: rescale(tensor, float(network.num_exits - index - 1)), state)


RELEASED: dict[str, type[GradientTap]] = {
    "msdnet": EquilibriumTap,
    "sdn-vgg": ReleasedChainTap,
    "sdn-resnet": ReleasedChainTap,
}
"""The families whose released placement is reproduced."""


def add_equilibrium(network: MultiExitNetwork, scope: Scope, variant: Variant) -> None:
    """Add the tap, after checking that a released variant exists for this network and that the scope means anything.

    Raises:
        UserError: there is no released code for this family, or no coarsest scale.
    """
    if variant == "released" and network.family not in RELEASED:
        raise UserError(
            f"no released Gradient Equilibrium code is reproduced for {network.family} networks, only for "
            f"{', '.join(RELEASED)}; use variant=paper"
        )
    if variant == "released" and RELEASED[network.family] is ReleasedChainTap:
        network.add_tap(ReleasedChainTap())
        return
    if scope == "coarsest" and network.family != "msdnet":
        raise UserError(
            f"ge_scope=coarsest is about MSDNet's scales, and this network is {network.family}; use ge_scope=all"
        )
    network.add_tap(EquilibriumTap(scope))


@dataclass(eq=False)
class GradientEquilibrium(TrainingStrategy):
    """Gradient Equilibrium: joint training with the gradients rescaled at every exit."""

    slots: ClassVar[frozenset[str]] = frozenset({GRADIENT_TAP})
    paper: ClassVar[str] = "Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019"

    variant: Variant = setting("paper", "follow the paper's equation or the released code")
    ge_scope: Scope | None = setting(
        None, "which of MSDNet's onward tensors are rescaled", variant={"paper": "all", "released": "coarsest"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)

    def adapt(self, network: MultiExitNetwork) -> None:
        """Put the rescalings at every boundary."""
        assert self.ge_scope is not None  # set by the variant
        add_equilibrium(network, self.ge_scope, self.variant)
