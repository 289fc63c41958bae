"""Gradient Equilibrium: every exit has the same share in the gradient of every stage.

Paper: Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019, section 3.2, equations 4 and 5,
https://arxiv.org/abs/1908.06294

At exit k = 0..K-1, the gradient from head k is multiplied by 1/(K-k), and the gradient from stage k + 1 by
(K-k-1)/(K-k). The gradients of all exits from k on then reach stage k with the factor 1/(K-k); the gradients inside
the heads do not change.

What differs from the published code. On MSDNet it rescales only the coarsest scale, which gives the factors of
equation 5 only along paths that never leave that scale; `ge_scope = "coarsest"` (`variant = "released"`) does the same.
`ge_scope = "all"`, the default, rescales every tensor of the state, and equation 5 then holds for every parameter. On
VGG and ResNet with internal classifiers, `variant = "released"` is the placement of `released/ge.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from exitkit.methods.released.ge import CHAINS, ReleasedChainTap
from exitkit.networks import GradientTap, MultiExitNetwork, State, map_tensors, rescale
from exitkit.strategy import GRADIENT_TAP, TrainingStrategy, UserError, Variant, resolve_variant, setting

Scope = Literal["all", "coarsest"]


@dataclass(frozen=True)
class EquilibriumTap(GradientTap):
    """The two rescalings of equation 4 at every boundary.

    `scope` selects the rescaled tensors of the state: `all`, or only the `coarsest` (the one that the head reads).
    """

    scope: Scope = "all"

    def to_head(self, network: MultiExitNetwork, index: int, view: Tensor) -> Tensor:
        """Multiply the gradient from head `index` by 1/(K-k)."""
        return rescale(view, 1 / (network.num_exits - index))

    def onward(self, network: MultiExitNetwork, index: int, state: State) -> State:
        """Multiply the gradient from the later stages by (K-k-1)/(K-k)."""
        remaining = network.num_exits - index
        factor = (remaining - 1) / remaining
        if self.scope == "coarsest":
            return network.with_view(state, rescale(network.view(state), factor))
        return map_tensors(lambda tensor: rescale(tensor, factor), state)


def add_equilibrium(network: MultiExitNetwork, scope: Scope, variant: Variant) -> None:
    """Add the gradient tap, after checking that the variant and the scope exist for this network.

    Raises:
        UserError: there is no released code for this family, or the network has no coarsest scale.
    """
    if variant == "released" and network.family in CHAINS:
        if scope != "coarsest":
            raise UserError(
                f"ge_scope is {scope}, and the released code for {network.family} networks rescales at one place; "
                "leave ge_scope out, or use variant=paper"
            )
        network.add_tap(ReleasedChainTap())
        return
    if variant == "released" and network.family != "msdnet":
        raise UserError(
            f"no released Gradient Equilibrium code is reproduced for {network.family} networks, only for "
            f"{', '.join(('msdnet', *CHAINS))}; use variant=paper"
        )
    if scope == "coarsest" and network.family != "msdnet":
        raise UserError(f"ge_scope=coarsest is for MSDNet only, and this network is {network.family}; use ge_scope=all")
    network.add_tap(EquilibriumTap(scope))


@dataclass(eq=False)
class GradientEquilibrium(TrainingStrategy):
    """Gradient Equilibrium: joint training with the gradients rescaled at every exit.

    Li et al., ICCV 2019, https://arxiv.org/abs/1908.06294

    At boundary k = 0..K-1, with the inputs v_k of head k and s_k of stage k + 1 (tensors [B, C, H, W]):
    dL/dv_k is multiplied by 1/(K-k), dL/ds_k by (K-k-1)/(K-k).

    Example:
        >>> strategy = exitkit.build_strategy("ge")
        >>> network = exitkit.build_network("msdnet-tiny")
        >>> strategy.adapt(network)
        >>> network.taps
        [EquilibriumTap(scope='all')]
    """

    slots: ClassVar[frozenset[str]] = frozenset({GRADIENT_TAP})
    paper: ClassVar[str] = "Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019"

    variant: Variant = setting("paper", "follow the paper's equation or the released code")
    ge_scope: Scope | None = setting(
        None, "scales of MSDNet that are rescaled", variant={"paper": "all", "released": "coarsest"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)

    def adapt(self, network: MultiExitNetwork) -> None:
        """Add the gradient tap."""
        assert self.ge_scope is not None  # set by the variant
        add_equilibrium(network, self.ge_scope, self.variant)
