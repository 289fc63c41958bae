"""RANet: sub-networks from low to high resolution, each of which fuses the features of the one below.

Paper: Yang et al., Resolution Adaptive Networks for Efficient Inference, CVPR 2020, figures 2 to 4.
Sub-network 1 works at the lowest resolution and classifies easy images. Harder images continue in the next sub-network,
which starts from its own, finer stem feature; its first blocks fuse the dense features of the sub-network below, block
by block, and reduce the map, so that all exits read the lowest resolution.

The state between two stages is the running tensor `x`, the dense features of the current sub-network's finished blocks
(which the next sub-network reads), and the stem features of the sub-networks that have not started. Unlike the released
code, maps of equal size are not resized, and a fusion block may have one layer instead of at least two. Initialisation:
the released He rule applies to all layers but the stem's.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from exitkit.errors import UserError
from exitkit.networks.cascade import Head, MultiExitNetwork
from exitkit.networks.families import layers
from exitkit.networks.families.base import IMAGENET, Backbone, preset
from exitkit.networks.families.layers import conv_bn_relu, unit
from exitkit.plugins import setting

Dense = list[Tensor]
"""Dense features of a block: its input, then the running tensor after each layer."""


class RanetState(NamedTuple):
    """The state between two stages, see the module; `dense` is empty if no sub-network follows."""

    x: Tensor
    dense: list[Dense]
    base: list[Tensor]


class Width(NamedTuple):
    """A map's channels, and how many times its size is half that of the finest stem feature."""

    channels: int
    level: int


def resized(x: Tensor, like: Tensor, needed: bool) -> Tensor:
    """Return x, resized to `like` by bilinear interpolation if `needed`."""
    return interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True) if needed else x


class ResolutionStem(nn.Module):
    """Stem features of the sub-networks, each computed from the next finer one. image -> features, lowest first."""

    def __init__(self, channels: int, widths: list[Width], stem: layers.Stem) -> None:
        super().__init__()
        finest_first = widths[::-1]
        self.features = nn.ModuleList([layers.first_layer(channels, finest_first[0].channels, stem)])
        for finer, coarser in itertools.pairwise(finest_first):
            self.features.append(conv_bn_relu(finer.channels, coarser.channels, 3, 1 + coarser.level - finer.level))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of all sub-networks."""
        features: list[Tensor] = []
        for feature in self.features:
            x = feature(x)
            features.insert(0, x)
        return features


class Block(nn.Module):
    """Dense layers; those of a fusion block also read the lower sub-network's dense features.

    (x, dense features of the lower sub-network) -> (x, dense features of this block).

    Args:
        wide: width of the input.
        layers: number of layers.
        growth: channels that a layer adds, and how many of them come from the lower sub-network in a fusion block.
        squeeze: bottleneck factors of this sub-network and of the lower one.
        low: widths of the lower sub-network's dense features; None makes a normal block.
        down: whether the last layer halves the map.
    """

    def __init__(
        self,
        wide: Width,
        layers: int,
        growth: tuple[int, int],
        squeeze: tuple[int, int],
        low: list[Width] | None,
        down: bool,
    ) -> None:
        super().__init__()
        total, lower = growth if low else (growth[0], 0)
        self.widths = [Width(wide.channels + t * total, wide.level + (down and t == layers)) for t in range(layers + 1)]
        strides = [1 + after.level - before.level for before, after in zip(self.widths, self.widths[1:], strict=False)]
        self.new = nn.ModuleList(
            [unit(w.channels, total - lower, s, squeeze[0]) for w, s in zip(self.widths, strides, strict=False)]
        )
        self.up = nn.ModuleList([unit(w.channels, lower, 1, squeeze[1]) for w in low[:-1]] if low and lower else [])
        self.shrinks = [stride > 1 for stride in strides]
        low = low or self.widths
        self.resizes = [a.level != b.level for a, b in zip(self.widths[1:], low[:-1], strict=True)]
        self.resizes_last = self.widths[-1].level != low[-1].level
        self.last: nn.Module | None = None
        self.transition: nn.Module = nn.Identity()
        self.out = self.widths[-1]

    def fuse_last(self, low: Width, channels: int) -> None:
        """Append `channels` computed from the lower sub-network's last dense feature."""
        self.last = conv_bn_relu(low.channels, channels, 1)
        self.out = Width(self.out.channels + channels, self.out.level)

    def narrow(self, channels: int) -> None:
        """Append a 1x1 convolution to `channels`."""
        self.transition = conv_bn_relu(self.out.channels, channels, 1)
        self.out = Width(channels, self.out.level)

    def forward(self, x: Tensor, low: Dense) -> tuple[Tensor, Dense]:
        """Return the block's output, and its dense features (before `fuse_last` and `narrow` apply)."""
        dense = [x]
        for index, layer in enumerate(self.new):
            new = layer(x)
            parts = [resized(x, new, self.shrinks[index])]
            if self.up:
                parts.append(resized(self.up[index](low[index]), new, self.resizes[index]))
            x = torch.cat([*parts, new], 1)
            dense.append(x)
        if self.last is not None:
            x = torch.cat([x, resized(self.last(low[-1]), x, self.resizes_last)], 1)
        return self.transition(x), dense


class Stage(nn.Module):
    """Blocks up to the next exit: one normal block, and before it all fusion blocks if a sub-network starts.

    Args:
        stem: the module that computes the stem features, in the first stage; else None.
        blocks: the blocks.
        starts: whether a sub-network starts in this stage.
        hands_on: whether a later sub-network reads the dense features of this one.
    """

    def __init__(self, stem: nn.Module | None, blocks: list[Block], starts: bool, hands_on: bool) -> None:
        super().__init__()
        if stem is not None:
            self.stem = stem
        self.first = stem is not None
        self.blocks = nn.ModuleList(blocks)
        self.starts = starts
        self.hands_on = hands_on

    def forward(self, state: Any) -> RanetState:
        """Return the state after the blocks; the first stage reads images."""
        x, dense, base = (state, [], self.stem(state)) if self.first else state
        below: list[Dense] = []
        if self.starts:
            below, dense = dense, []
            x, *base = base
        for index, block in enumerate(self.blocks):
            x, features = block(x, below[index] if index < len(below) else [])
            dense = [*dense, features] if self.hands_on else []
        return RanetState(x, dense, base)


class RANetwork(MultiExitNetwork):
    """The cascade of a RANet; its heads read the running tensor."""

    def view(self, state: Any) -> Tensor:
        """Return the running tensor."""
        tensor: Tensor = state.x
        return tensor

    def with_view(self, state: Any, tensor: Tensor) -> RanetState:
        """Return the state with the running tensor replaced."""
        replaced: RanetState = state._replace(x=tensor)
        return replaced


@dataclass(frozen=True)
class RANet(Backbone):
    """RANet, any number of sub-networks (Yang et al., CVPR 2020); lists run from the lowest resolution up."""

    scales: tuple[int, ...] = setting((1, 2, 3, 3), "resolution level of each sub-network, 1 the lowest")
    blocks: int = setting(2, "blocks, and exits, of the first sub-network")
    block_step: int = setting(2, "further blocks, and exits, of each following sub-network")
    step: int = setting(4, "layers per block")
    step_mode: Literal["even", "lin_grow"] = setting("even", "step layers in every block, or step*b in block b")
    channels: int = setting(16, "width unit of the stem")
    growth: int = setting(6, "width unit that a layer adds")
    growth_factors: tuple[int, ...] = setting((4, 2, 1, 1), "factor of the width units in each sub-network")
    bottleneck_factors: tuple[int, ...] = setting((4, 2, 1, 1), "width factor of the 1x1 bottlenecks in each one")
    compress: float = setting(0.25, "share of a fusion layer's channels that comes from the lower sub-network")
    reduction: float = setting(0.5, "share of the channels that a transition keeps (0: no transitions)")
    stem: layers.Stem = setting("small", layers.STEM)
    head: layers.HeadForm = setting("conv128", layers.HEAD)
    init: layers.Init = setting("released", layers.INIT)

    def __post_init__(self) -> None:
        for name in ("blocks", "block_step", "step", "channels", "growth"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1")
        rises = [after - before for before, after in zip((1, *self.scales), self.scales, strict=False)]
        if not self.scales or self.scales[0] != 1 or not set(rises) <= {0, 1}:
            raise UserError(
                f"scales is {'-'.join(map(str, self.scales))}; expected levels that start at 1 and rise by 0 or 1, "
                "such as 1-2-3-3"
            )
        for name in ("growth_factors", "bottleneck_factors"):
            factors = getattr(self, name)
            if len(factors) != len(self.scales) or min(factors, default=0) < 1:
                raise UserError(
                    f"{name} is {'-'.join(map(str, factors))}; expected one factor of at least 1 for each of the "
                    f"{len(self.scales)} sub-networks"
                )
        if not 0 <= self.compress < 1:
            raise UserError(f"compress is {self.compress}; expected a share from 0 up to below 1 (the paper's is 0.25)")
        if not 0 <= self.reduction <= 1:
            raise UserError(f"reduction is {self.reduction}; expected a share between 0 and 1 (the paper's is 0.5)")

    @property
    def block_counts(self) -> list[int]:
        """Number of blocks of each sub-network."""
        return [self.blocks + index * self.block_step for index in range(len(self.scales))]

    def build(self, input_shape: tuple[int, int, int], num_classes: int) -> MultiExitNetwork:
        """Build the network; see `Backbone.build`."""
        reduction = 2 ** (self.scales[-1] - 1) * layers.STEM_STRIDES[self.stem]
        if min(input_shape[1:]) < reduction:
            raise UserError(
                f"images of {input_shape[1]}x{input_shape[2]} are too small for {self.scales[-1]} resolutions; "
                f"expected at least {reduction}x{reduction}, or fewer scales"
            )
        base = [
            Width(self.channels * factor, self.scales[-1] - scale)
            for factor, scale in zip(self.growth_factors, self.scales, strict=True)
        ]
        stem: nn.Module | None = ResolutionStem(input_shape[0], base, self.stem)
        stages: list[Stage] = []
        heads: list[Head] = []
        below: list[Block] = []
        for index, count in enumerate(self.block_counts):
            blocks = self._sub_network(index, count, base[index], below)
            fused = len(below)
            for end in range(fused + 1, count + 1):
                starts = end == fused + 1
                stage_blocks = blocks[:end] if starts else blocks[end - 1 : end]
                stages.append(Stage(stem, stage_blocks, starts, hands_on=index < len(self.scales) - 1))
                heads.append(layers.make_head(stage_blocks[-1].out.channels, num_classes, self.head))
                stem = None
            below = blocks
        network = RANetwork(stages, heads, input_shape, num_classes, family="ranet")
        if self.init != "default":
            network.apply(layers.he_init)
            if self.init == "released":
                stages[0].stem.apply(_default_init)
        return network

    def _sub_network(self, index: int, count: int, base: Width, below: list[Block]) -> list[Block]:
        """Return the blocks of one sub-network; block i fuses block i of the lower sub-network, if that exists."""
        scale, total = self.scales[index], self.growth * self.growth_factors[index]
        ends = [0, *self.block_counts[:index]]
        downs = ends[len(ends) - (scale - 1) :]
        narrows = {j * count // scale for j in range(1, scale)} if self.reduction > 0 else set()
        growth = (total, math.floor(self.compress * total))
        squeeze = (self.bottleneck_factors[index], self.bottleneck_factors[max(index - 1, 0)])
        blocks: list[Block] = []
        wide = base
        for number in range(1, count + 1):
            low = below[number - 1].widths if number <= len(below) else None
            layers = self.step if self.step_mode == "even" else self.step * number
            block = Block(wide, layers, growth, squeeze, low, number in downs)
            if low and (share := math.floor(self.compress * block.out.channels)):
                block.fuse_last(low[-1], share)
            if number in narrows:
                narrow = math.floor(self.reduction * block.out.channels)
                if narrow < 1:
                    channels = block.out.channels
                    raise UserError(f"reduction {self.reduction} keeps none of {channels} channels; expected more")
                block.narrow(narrow)
            wide = block.out
            blocks.append(block)
        return blocks


def _default_init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        module.reset_parameters()


preset(RANet, "8 exits, scales 1-2-3-3, 4 layers per block (BoostNet table 1)", name="ranet-cifar-any")
for scales, factors in (((1, 2, 3), (4, 2, 1)), ((1, 2, 2, 3), (4, 2, 2, 1)), ((1, 2, 3, 3), (4, 2, 1, 1))):
    preset(
        RANet,
        f"{2 * len(scales)} exits, scales {'-'.join(map(str, scales))}, 2, 4, ... layers per block (BoostNet figure 4)",
        name=f"ranet-cifar-{''.join(map(str, scales))}",
        scales=scales,
        step=2,
        step_mode="lin_grow",
        growth_factors=factors,
        bottleneck_factors=factors,
    )
for channels, where in ((32, ""), (64, " (BoostNet table 2)")):
    preset(
        RANet,
        f"ImageNet, 8 exits, stem width {channels}{where}",
        IMAGENET,
        name=f"ranet-imagenet-{channels}",
        scales=(1, 2, 3, 4),
        step=8,
        channels=channels,
        growth=16,
        growth_factors=(4, 2, 2, 1),
        bottleneck_factors=(4, 2, 2, 1),
        stem="large",
        head="conv",
    )
preset(
    RANet,
    "4 exits, 7,462 parameters, for the default data (from no paper)",
    ((1, 16, 16), 10),
    name="ranet-tiny",
    scales=(1, 2, 3),
    block_step=1,
    step=1,
    step_mode="lin_grow",
    channels=2,
    growth=4,
    growth_factors=(2, 1, 1),
    bottleneck_factors=(2, 1, 1),
    head="pool",
)
