"""MSDNet: dense layers at several scales in parallel; every exit reads the coarsest scale.

Paper: Huang et al., Multi-Scale Dense Networks for Resource Efficient Image Classification, ICLR 2018, figure 2.
The scales are ordered fine to coarse. Every layer adds `growth` channels (times the scale's factor) to each remaining
scale, computed from the same scale and from the next finer one. Scales are dropped along the depth, finest first, with
a 1x1 convolution that halves the width after each drop.

Initialisation: the released code's He rule has no effect (it visits containers only), so that all published results
use PyTorch's defaults; exitkit does the same unless `init` is `he`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from exitkit.errors import UserError
from exitkit.escaping import counted
from exitkit.networks.cascade import Head, MultiExitNetwork
from exitkit.networks.families.base import IMAGENET, Backbone, preset
from exitkit.networks.families.layers import (
    HEAD,
    INIT,
    STEM,
    STEM_STRIDES,
    HeadForm,
    Init,
    Stem,
    conv_bn_relu,
    first_layer,
    he_init,
    make_head,
    unit,
)
from exitkit.plugins import setting

Scales = list[Tensor]
"""Tensors of the remaining scales, fine to coarse."""


class MultiScaleStem(nn.Module):
    """First tensors of all scales, each computed from the next finer one. image -> scales."""

    def __init__(self, channels: int, widths: list[int], stem: Stem) -> None:
        super().__init__()
        first = first_layer(channels, widths[0], stem)
        rest = [conv_bn_relu(finer, coarser, 3, 2) for finer, coarser in pairwise(widths)]
        self.scales = nn.ModuleList([first, *rest])

    def forward(self, x: Tensor) -> Scales:
        """Return the first tensors of all scales."""
        scales = []
        for scale in self.scales:
            x = scale(x)
            scales.append(x)
        return scales


class Layer(nn.Module):
    """One dense layer. scales -> scales, each with the layer's new channels; the finest scales may be dropped.

    Args:
        same: for each remaining scale, the unit that reads the scale itself.
        down: for each remaining scale, the stride-2 unit that reads the next finer scale, or None.
        dropped: number of the finest scales that are dropped.
    """

    def __init__(self, same: list[nn.Module], down: list[nn.Module | None], dropped: int) -> None:
        super().__init__()
        self.same = nn.ModuleList(same)
        self.down = nn.ModuleList([nn.Identity() if module is None else module for module in down])
        self.has_down = [module is not None for module in down]
        self.dropped = dropped

    def forward(self, x: Scales) -> Scales:
        """Return the remaining scales, with the new channels."""
        grown = []
        for index, (same, down) in enumerate(zip(self.same, self.down, strict=True)):
            at = index + self.dropped
            parts = [x[at], down(x[at - 1]), same(x[at])] if self.has_down[index] else [x[at], same(x[at])]
            grown.append(torch.cat(parts, 1))
        return grown


class Transition(nn.Module):
    """One 1x1 convolution per scale that reduces its width. scales -> scales."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        super().__init__()
        self.scales = nn.ModuleList([conv_bn_relu(wide, narrow, 1) for wide, narrow in pairs])

    def forward(self, x: Scales) -> Scales:
        """Return the scales with reduced widths."""
        return [scale(tensor) for scale, tensor in zip(self.scales, x, strict=True)]


class MSDNetwork(MultiExitNetwork):
    """The cascade of an MSDNet; its state is the list of the remaining scales, and its heads read the coarsest."""

    def view(self, state: Any) -> Tensor:
        """Return the coarsest scale."""
        tensor: Tensor = state[-1]
        return tensor

    def with_view(self, state: Any, tensor: Tensor) -> Scales:
        """Return the scales with the coarsest one replaced."""
        return [*state[:-1], tensor]


@dataclass(frozen=True)
class MSDNet(Backbone):
    """MSDNet, any number of exits and scales (Huang et al., ICLR 2018)."""

    blocks: int = setting(7, "exits")
    base: int = setting(4, "layers before the first exit")
    step: int = setting(2, "layers between exits")
    step_mode: Literal["even", "lin_grow"] = setting("even", "step layers, or step*i + 1 before exit i (from 0)")
    channels: int = setting(16, "width unit of the stem")
    growth: int = setting(6, "width unit that a layer adds")
    growth_factors: tuple[int, ...] = setting((1, 2, 4), "factor of the width units at each scale, fine to coarse")
    bottleneck_factors: tuple[int, ...] = setting((1, 2, 4), "width factor of the 1x1 bottlenecks at each scale")
    bottleneck: bool = setting(True, "use 1x1 bottlenecks")
    prune: Literal["max", "min"] = setting("max", "drop the scales evenly along the depth, or only at its end")
    reduction: float = setting(0.5, "share of the channels that a transition keeps (0: no transitions)")
    stem: Stem = setting("small", STEM)
    head: HeadForm = setting("conv128", HEAD)
    init: Init = setting("released", INIT)

    def __post_init__(self) -> None:
        for name in ("blocks", "base", "step", "channels", "growth"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1")
        if len(self.growth_factors) != len(self.bottleneck_factors) or not self.growth_factors:
            raise UserError(
                f"growth_factors has {len(self.growth_factors)} values and bottleneck_factors "
                f"{len(self.bottleneck_factors)}; expected one per scale in each"
            )
        if min(*self.growth_factors, *self.bottleneck_factors) < 1:
            raise UserError("growth_factors or bottleneck_factors has a value below 1; expected at least 1")
        if not 0 <= self.reduction <= 1:
            raise UserError(f"reduction is {self.reduction}; expected a share between 0 and 1 (the paper's is 0.5)")
        layers, scales = sum(self.stage_lengths), len(self.growth_factors)
        if self.prune == "min" and layers < scales - 1:
            raise UserError(
                f"prune=min drops one of {scales} scales per layer, and there {'is' if layers == 1 else 'are'} "
                f"{counted(layers, 'layer')}; expected at least {scales - 1}, or prune=max"
            )
        odd = [factor for factor in self.growth_factors[1:] if self.growth * factor % 2]
        if odd:
            raise UserError(
                f"growth {self.growth} times the factor {odd[0]} is odd, and a coarser scale gets its channels in two "
                f"equal halves; expected an even product, such as growth {self.growth + 1}"
            )

    @property
    def stage_lengths(self) -> list[int]:
        """Number of layers of each stage."""
        between = [self.step if self.step_mode == "even" else self.step * i + 1 for i in range(1, self.blocks)]
        return [self.base, *between]

    def build(self, input_shape: tuple[int, int, int], num_classes: int) -> MultiExitNetwork:
        """Build the network; see `Backbone.build`."""
        self._check_size(input_shape)
        factors = self.growth_factors
        layers = self._layers()
        stages: list[nn.Module] = []
        heads: list[Head] = []
        for length in self.stage_lengths:
            modules: list[nn.Module] = []
            if not stages:
                stem_widths = [self.channels * factor for factor in factors]
                modules.append(MultiScaleStem(input_shape[0], stem_widths, self.stem))
            for _ in range(length):
                built, width = next(layers)
                modules += built
            stages.append(nn.Sequential(*modules))
            heads.append(make_head(width * factors[-1], num_classes, self.head))
        network = MSDNetwork(stages, heads, input_shape, num_classes, family="msdnet")
        return network.apply(he_init) if self.init == "he" else network

    def _check_size(self, input_shape: tuple[int, int, int]) -> None:
        reduction = 2 ** (len(self.growth_factors) - 1) * STEM_STRIDES[self.stem]
        if min(input_shape[1:]) < reduction:
            raise UserError(
                f"images of {input_shape[1]}x{input_shape[2]} are too small for {len(self.growth_factors)} scales; "
                f"expected at least {reduction}x{reduction}, or fewer scales"
            )

    def _scale_counts(self, layer: int) -> tuple[int, int]:
        """Return the number of scales that layer `layer` (from 1) reads, and the number that it returns."""
        total, scales = sum(self.stage_lengths), len(self.growth_factors)
        if self.prune == "min":
            return min(scales, total - layer + 2), min(scales, total - layer + 1)
        interval = math.ceil(total / scales)
        return scales - max(0, layer - 2) // interval, scales - (layer - 1) // interval

    def _narrows(self, layer: int) -> bool:
        """Whether a transition follows layer `layer`."""
        total = sum(self.stage_lengths)
        scales_in, scales_out = self._scale_counts(layer)
        dropping = scales_in > scales_out if self.prune == "max" else layer in (total // 3, 2 * total // 3)
        return self.reduction > 0 and dropping

    def _layers(self) -> Iterator[tuple[list[nn.Module], int]]:
        """Yield the modules of each layer (with its transition, if any) and the width unit after it."""
        width = self.channels
        for number in range(1, sum(self.stage_lengths) + 1):
            modules: list[nn.Module] = [self._layer(width, *self._scale_counts(number))]
            width += self.growth
            if self._narrows(number):
                narrow = math.floor(self.reduction * width)
                if narrow < 1:
                    raise UserError(f"reduction {self.reduction} keeps none of {width} channels; expected more")
                factors = self.growth_factors[-self._scale_counts(number)[1] :]
                modules.append(Transition([(width * factor, narrow * factor) for factor in factors]))
                width = narrow
            yield modules, width

    def _layer(self, width: int, scales_in: int, scales_out: int) -> Layer:
        factors = self.growth_factors
        scales = len(factors)
        same: list[nn.Module] = []
        down: list[nn.Module | None] = []
        for scale in range(scales - scales_out, scales):
            squeeze = self.bottleneck_factors[scale] if self.bottleneck else None
            grown = self.growth * factors[scale]
            if scale == scales - scales_out and scales_in == scales_out:
                down.append(None)
            else:
                finer = self.bottleneck_factors[scale - 1] if self.bottleneck else None
                grown //= 2
                down.append(unit(width * factors[scale - 1], grown, 2, finer))
            same.append(unit(width * factors[scale], grown, 1, squeeze))
        return Layer(same, down, scales_in - scales_out)


preset(
    MSDNet,
    "4 exits, 4,330 parameters, for the default data (from no paper)",
    ((1, 16, 16), 10),
    name="msdnet-tiny",
    blocks=4,
    base=1,
    step=1,
    channels=2,
    growth=4,
    growth_factors=(1, 1, 2),
    bottleneck_factors=(1, 1, 2),
    head="pool",
)
preset(MSDNet, "7 exits, base 4, step 2, growth 6 (the released MSDNet code's anytime network)", name="msdnet-cifar-k7")
preset(MSDNet, "10 exits, base 4, step 2, growth 6 (BoostNet table 1)", name="msdnet-cifar-k10", blocks=10)
preset(MSDNet, "7 exits, base 4, step 2, growth 16 (Meta-GF tables 1 and 5)", name="msdnet-cifar-k7-g16", growth=16)
for exits, where in (
    (4, "MSDNet's budgeted-batch family"),
    (5, "IMTA table 2, L2W-DEN"),
    (6, "MSDNet's budgeted-batch family"),
    (7, "IMTA table 1"),
    (8, "MSDNet's budgeted-batch family"),
):
    doc = f"{exits} exits, 1, 2, ... {exits} layers per stage ({where})"
    preset(MSDNet, doc, name=f"msdnet-cifar-lg{exits}", blocks=exits, base=1, step=1, step_mode="lin_grow")
for base in (4, 8, 12):
    doc = f"6 exits, base {base}, step 2 (BoostNet figure 4)"
    preset(MSDNet, doc, name=f"msdnet-cifar-k6-b{base}", blocks=6, base=base)
for step, where in (
    (4, "IMTA table 3, Meta-GF table 2, L2W-DEN"),
    (5, "IMTA's scripts"),
    (6, "IMTA's scripts, L2W-DEN"),
    (7, "BoostNet table 2, L2W-DEN"),
):
    preset(
        MSDNet,
        f"ImageNet, 5 exits, {step} layers per stage ({where})",
        IMAGENET,
        name=f"msdnet-imagenet-s{step}",
        blocks=5,
        base=step,
        step=step,
        channels=32,
        growth=16,
        growth_factors=(1, 2, 4, 4),
        bottleneck_factors=(1, 2, 4, 4),
        stem="large",
        head="conv",
    )
