"""Deep Feature Surgery: the later exits train a share of the channels at each boundary, and only read the rest.

Paper: Gong et al., Deep Feature Surgery: Towards Accurate and Efficient Multi-Exit Networks, ECCV 2024,
https://arxiv.org/abs/2407.13986

After stage k = 0..K-2, let x [B, c, ...] be the input of head k, n = round(beta c), P = x[:, :n] the shared channels,
S = x[:, n:] those of exit k, and sg the stop-gradient. Then

    stage k + 1 reads  [P, sg(S)]
    head k reads       [sg(P), S]   (head = "partition")    or    [P, S]   (head = "whole")

Partitioning divides the gradients; the paper calls reading the other part without training it referencing. The forward
pass is that of joint training. `referencing = false`, an ablation, replaces sg(.) by zeros, in training and at
inference. Dense layers append their channels, so that S are the newest ones of a stage.

What differs from the published code (https://github.com/GongCheng1919/dfs): on MSDNet its heads train all channels that
they read; `variant = "released"` does the same. On VGG it implements [P, sg(S)] by two convolutions without bias, each
with its own initialisation, which is not reproduced. In all networks it partitions only the tensor that the head reads,
as `scope = "coarsest"` does; `scope = "all"` is an addition. Its MSDNet has dropout of 0.5 before every classifier. Its
ResNet-18 has the exits of Be Your Own Teacher and trains with its losses as well (weight 0.3, T = 3), with hints of
weight 0.03 at all exits but the last. Neither is part of this method; `dfs+byot` trains with both on the heads of the
given network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from exitkit.networks import GradientTap, Head, MultiExitNetwork, State, map_tensors
from exitkit.networks.attach.heads import MovedChannels
from exitkit.strategy import GRADIENT_TAP, TrainingStrategy, UserError, Variant, resolve_variant, setting

HeadInput = Literal["whole", "partition"]
Scope = Literal["coarsest", "all"]
Replace = Callable[[Tensor], Tensor]
"""Function of the channels that a reader does not train: `Tensor.detach`, or `torch.zeros_like`."""


@dataclass(frozen=True)
class PartitionTap(GradientTap):
    """Divides the channels at every boundary between its exit and the later ones."""

    beta: float
    head: HeadInput
    scope: Scope
    referencing: bool

    def to_head(self, network: MultiExitNetwork, index: int, view: Tensor) -> Tensor:
        """Return [sg(P), S], or [P, S] if the head trains all channels that it reads."""
        return self.read_by_head(network, index, view, Tensor.detach)

    def onward(self, network: MultiExitNetwork, index: int, state: State) -> State:
        """Return [P, sg(S)]."""
        return self.handed_on(network, index, state, Tensor.detach)

    def read_by_head(self, network: MultiExitNetwork, index: int, view: Tensor, replace: Replace) -> Tensor:
        """Return the input of head `index`, with its shared channels replaced if heads are partitioned."""
        if self.head == "whole" or index == network.num_exits - 1:
            return view
        return self._replaced(network, index, replace, view, shared=True)

    def handed_on(self, network: MultiExitNetwork, index: int, state: State, replace: Replace) -> State:
        """Return the input of stage `index + 1`, with the channels of exit `index` replaced."""
        if self.scope == "coarsest":
            view = self._replaced(network, index, replace, network.view(state), shared=False)
            return network.with_view(state, view)
        return map_tensors(functools.partial(self._replaced, network, index, replace, shared=False), state)

    def _replaced(self, network: MultiExitNetwork, index: int, replace: Replace, x: Tensor, *, shared: bool) -> Tensor:
        """Return x with its shared channels replaced, or with the other ones replaced."""
        axis = channel_axis(network, index, x)
        count = round(self.beta * x.shape[axis])
        if count in (0, x.shape[axis]):
            return replace(x) if shared == (count > 0) else x
        first, rest = x.tensor_split([count], axis)
        return torch.cat([replace(first), rest] if shared else [first, replace(rest)], axis)


def channel_axis(network: MultiExitNetwork, index: int, x: Tensor) -> int:
    """Return the channels' dimension of a tensor at boundary `index`.

    It is the one that the head moves first, or does not average over; if there is none, dimension 1 of maps and the
    last one of tokens.
    """
    embed: Any = network.heads[index].embed
    for module in embed.modules():
        if isinstance(module, MovedChannels):
            return module.axis
        averaged: Any = getattr(module, "over", None)
        others = [axis for axis in range(1, x.dim()) if averaged and axis not in averaged]
        if len(others) == 1:
            return others[0]
    return 2 if x.dim() == 3 else 1


@dataclass(eq=False)
class DeepFeatureSurgery(TrainingStrategy):
    """Deep Feature Surgery: the channels at each boundary are divided between its exit and the later exits.

    Gong et al., ECCV 2024, https://arxiv.org/abs/2407.13986

    With x = [P, S] [B, c, ...] after stage k and round(beta c) channels in P: stage k + 1 reads [P, sg(S)], head k
    reads [sg(P), S], and L = sum_k mean_i CE(z_k,i, y_i), for logits z_k [B, C] and labels y [B].

    Example:
        >>> strategy = exitkit.build_strategy("dfs", beta=0.25)
        >>> network = exitkit.build_network("msdnet-tiny")
        >>> strategy.adapt(network)
        >>> network.taps
        [PartitionTap(beta=0.25, head='partition', scope='coarsest', referencing=True)]
    """

    slots: ClassVar[frozenset[str]] = frozenset({GRADIENT_TAP})
    paper: ClassVar[str] = (
        "Gong et al., Deep Feature Surgery: Towards Accurate and Efficient Multi-Exit Networks, ECCV 2024"
    )

    variant: Variant = setting("paper", "follow the paper's partition or the released code")
    beta: float = setting(0.5, "share of the channels that the later exits train", search=(0.1, 0.9))
    head: HeadInput | None = setting(
        None,
        "channels that the exit trains: its own part, or all",
        variant={"paper": "partition", "released": "whole"},
    )
    scope: Scope = setting("coarsest", "partition only the tensor that the head reads, or all tensors of the state")
    referencing: bool = setting(True, "read the other part without training it; false: zeros in its place")

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)
        if not 0 <= self.beta <= 1:
            raise UserError(f"beta is {self.beta}; expected a share between 0 and 1 (the paper's is 0.5)")

    def adapt(self, network: MultiExitNetwork) -> None:
        """Add the tap; without referencing, also replace channels of the inputs of stages and heads by zeros."""
        if self.variant == "released" and network.family != "msdnet":
            raise UserError(
                f"no released Deep Feature Surgery code is reproduced for {network.family} networks, only for msdnet; "
                "use variant=paper"
            )
        assert self.head is not None  # set by the variant
        tap = PartitionTap(self.beta, self.head, self.scope, self.referencing)
        if tap in network.taps:
            return
        network.add_tap(tap)
        if not self.referencing:
            _add_zeros(tap, network)


def _add_zeros(tap: PartitionTap, network: MultiExitNetwork) -> None:
    """Replace the channels that are not trained by zeros, by hooks of the modules, since inference leaves taps out."""
    for index, head in enumerate(network.heads[:-1]):
        assert isinstance(head, Head)  # as every cascade has them
        # The first layer, because features before pooling are computed layer by layer.
        entry = head.embed[0] if isinstance(head.embed, nn.Sequential) and len(head.embed) else head.embed
        for module, change in ((entry, tap.read_by_head), (network.stages[index + 1], tap.handed_on)):
            zeroed = functools.partial(change, network, index, replace=torch.zeros_like)
            module.register_forward_pre_hook(functools.partial(_changed_input, zeroed))


def _changed_input(change: Replace, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return change(inputs[0]), *inputs[1:]
