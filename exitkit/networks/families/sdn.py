"""Shallow-deep networks (SDN): a plain trunk with an internal classifier after some of its units.

Paper: Kaya et al., Shallow-Deep Networks: Understanding and Mitigating Network Overthinking, ICML 2019; the networks
are those of Meta-GF (Sun et al., ECCV 2022), tables 3 and 4. An internal classifier pools its map to 4x4, by a learned
mix of maximum and average, and applies one linear layer. Exits are placed where the cumulative cost is nearest to 15,
30, ... 90 % of the total.

As in the released code, the classifier does not pool maps below 4x4, and pooling does not change 4x4 maps, so that the
mixing weight has no effect there; ResNet's classifiers read the sum before its ReLU, and the next unit reads it after
the ReLU. Unlike the released code, any image size is accepted: kernels are chosen when the network is built, and the
last pooling averages the whole map.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d
from torch.utils.flop_counter import FlopCounterMode

from exitkit.errors import UserError
from exitkit.networks.cascade import Head, MultiExitNetwork, Units
from exitkit.networks.families.base import Backbone, preset
from exitkit.networks.families.layers import conv_bn_relu
from exitkit.networks.placement import place
from exitkit.plugins import setting

Shape = tuple[int, ...]


class MixedPool(nn.Module):
    """alpha * maximum + (1 - alpha) * average over each kernel; alpha is learned and unbounded."""

    def __init__(self, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.kernel = kernel
        self.alpha = nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        """Pool x [B, C, H, W] to [B, C, H/kernel, W/kernel]."""
        # For a 1x1 kernel maximum and average are equal, so that the output must not depend on alpha.
        alpha = self.alpha if max(self.kernel) > 1 else self.alpha.detach()
        return alpha * max_pool2d(x, self.kernel) + (1 - alpha) * avg_pool2d(x, self.kernel)


def internal_classifier(shape: Shape, num_classes: int) -> Head:
    """Return the head of an internal classifier for maps of `shape` (channels, height, width)."""
    channels, height, width = shape
    pool: list[nn.Module] = []
    if min(height, width) >= 4:
        kernel = (height // 4, width // 4)
        height, width = height // kernel[0], width // kernel[1]
        pool = [MixedPool(kernel)]
    return Head(nn.Sequential(*pool, nn.Flatten()), nn.Linear(channels * height * width, num_classes))


def pooled_head(width: int, num_classes: int, *before: nn.Module) -> Head:
    """Return the last head: the modules `before`, the average over the map, and one linear layer."""
    layers = nn.Sequential(*before, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Head(layers, nn.Linear(width, num_classes), before_pooling=len(before))


class Trunk(NamedTuple):
    """A chain without exits: modules before its units, the units, modules after them, and the last head."""

    stem: list[nn.Module]
    units: list[nn.Module]
    end: list[nn.Module]
    head: Head


@dataclass(frozen=True)
class ShallowDeep(Backbone, ABC):
    """Base class of all trunks, which places the exits.

    Class attributes:
        family: see `MultiExitNetwork`.
        network: class of the cascade.
        usual: indices of the units with an exit after them in the paper.
        sizes: names of fields whose values must be at least 1.
        positions: names of fields that contain indices of units.
    """

    family: ClassVar[str]
    network: ClassVar[type[MultiExitNetwork]] = MultiExitNetwork
    usual: ClassVar[tuple[int, ...]]
    sizes: ClassVar[tuple[str, ...]]
    positions: ClassVar[tuple[str, ...]] = ()

    exits: tuple[int, ...] | None = setting(None, "units (from 0) after which exits are placed; none: as in the paper")
    fractions: tuple[float, ...] | None = setting(None, "instead of exits, shares of the cost at which they are placed")
    init: Literal["released", "default"] = setting(
        "released", "initialisation: that of the released code, or PyTorch's default"
    )

    def __post_init__(self) -> None:
        if self.exits is not None and self.fractions is not None:
            raise UserError("exits and fractions both place the exits; give one of them, and leave the other at none")
        for name in self.sizes:
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise UserError(f"{name} is {value}; expected at least 1")
        for name in self.positions:
            units = len(getattr(self, "channels"))  # noqa: B009  only trunks with one width a unit name positions
            wrong = [unit for unit in getattr(self, name) if not 0 <= unit < units]
            if wrong:
                raise UserError(f"{name} contains unit {wrong[0]}; expected units from 0 to {units - 1}")

    @abstractmethod
    def trunk(self, input_shape: tuple[int, int, int], num_classes: int) -> Trunk:
        """Return the trunk for such images; its `head` is that of the last exit."""

    def init_released(self, module: nn.Module) -> None:
        """Initialise one module as the released code does; by default PyTorch's initialisation is kept."""

    def build(self, input_shape: tuple[int, int, int], num_classes: int) -> MultiExitNetwork:
        """Build the network; see `Backbone.build`."""
        trunk = self.trunk(input_shape, num_classes)
        shapes, costs = measure(trunk, input_shape)
        places = self._places(len(trunk.units), costs)
        units = [*trunk.units, *trunk.end]
        bounds = [0, *(place + 1 for place in places), len(units)]
        pieces = [units[start:end] for start, end in pairwise(bounds)]
        pieces[0] = [*trunk.stem, *pieces[0]]
        heads = [internal_classifier(shapes[place], num_classes) for place in places]
        stages = [Units(*piece) for piece in pieces]
        network = self.network(stages, [*heads, trunk.head], input_shape, num_classes, family=self.family)
        return network.apply(self.init_released) if self.init == "released" else network

    def _places(self, units: int, costs: list[int]) -> list[int]:
        if self.fractions is not None:
            return place(costs, self.fractions)
        places = list(self.usual if self.exits is None else self.exits)
        if self.exits is None and places and places[-1] >= units - 1:
            raise UserError(f"the paper's exits do not fit a trunk of {units} units; expected exits or fractions")
        if not places or places != sorted(set(places)) or not 0 <= places[0] <= places[-1] < units - 1:
            raise UserError(
                f"exits is {','.join(map(str, places)) or 'empty'}; expected ascending units from 0 to {units - 2} "
                f"(the trunk has {units}, and its last exit follows the last unit)"
            )
        return places


def measure(trunk: Trunk, input_shape: tuple[int, int, int]) -> tuple[list[Shape], list[int]]:
    """Return the output shape and the multiply-adds of each unit; the first includes the stem, the last the end."""
    state: Any = torch.empty(1, *input_shape, device="meta")
    shapes, totals = [], []
    meta_copy = copy.deepcopy(trunk)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for module in meta_copy.stem:
            state = module.to("meta").eval()(state)
        for unit in meta_copy.units:
            state = unit.to("meta").eval()(state)
            shapes.append(tuple((state[1] if isinstance(state, tuple) else state).shape[1:]))
            totals.append(counter.get_total_flops() // 2)
        for module in meta_copy.end:
            state = module.to("meta").eval()(state)
        totals[-1] = counter.get_total_flops() // 2
    return shapes, [after - before for before, after in pairwise([0, *totals])]


def _widths(blocks: Sequence[int], widths: Sequence[int], first: int) -> list[tuple[int, int, int]]:
    """Return (inputs, outputs, stride) of each block; every group but the first halves the map."""
    rows = []
    for group, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        for index in range(count):
            rows.append((first, width, 2 if group and not index else 1))
            first = width
    return rows


@dataclass(frozen=True)
class VGG(ShallowDeep):
    """VGG-16 with internal classifiers, 7 exits (Kaya et al., ICML 2019; Meta-GF table 3)."""

    family: ClassVar[str] = "sdn-vgg"
    usual: ClassVar[tuple[int, ...]] = (1, 3, 5, 6, 8, 9)
    sizes: ClassVar[tuple[str, ...]] = ("channels", "hidden")
    positions: ClassVar[tuple[str, ...]] = ("pools",)

    channels: tuple[int, ...] = setting(
        (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512), "width of each unit"
    )
    pools: tuple[int, ...] = setting((1, 3, 6, 9, 12), "units (from 0) that end in 2x2 pooling")
    hidden: tuple[int, int] = setting((512, 512), "widths of the two hidden linear layers")

    def trunk(self, input_shape: tuple[int, int, int], num_classes: int) -> Trunk:
        """See `ShallowDeep.trunk`."""
        units: list[nn.Module] = []
        height, width = input_shape[1:]
        for index, (inputs, outputs) in enumerate(pairwise((input_shape[0], *self.channels))):
            unit = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            if index in self.pools:
                height, width = (height + 1) // 2, (width + 1) // 2
                unit.append(nn.MaxPool2d(2, ceil_mode=True))
            units.append(nn.Sequential(*unit))
        first, second = self.hidden
        flat = self.channels[-1] * height * width
        end = nn.Sequential(nn.Flatten(), nn.Linear(flat, first), nn.ReLU(), nn.Dropout(0.5))
        # As in the released code, there is no ReLU between the last two linear layers.
        head = Head(nn.Sequential(nn.Linear(first, second), nn.Dropout(0.5)), nn.Linear(second, num_classes))
        return Trunk([], units, [end], head)

    def init_released(self, module: nn.Module) -> None:
        """Initialise convolutions from N(0, 2 / (k*k*outputs)), linear layers from N(0, 0.01^2), and biases to 0."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class Activated(nn.Module):
    """Sum of paths, returned as (after ReLU, before ReLU); of such a pair as input it reads the first tensor."""

    def __init__(self, *paths: nn.Module) -> None:
        super().__init__()
        self.paths = nn.ModuleList(paths)

    def forward(self, state: Any) -> tuple[Tensor, Tensor]:
        """Return (relu(s), s), where s is the sum over the paths; the input is a pair or a tensor of images."""
        x = state[0] if isinstance(state, tuple) else state
        first, *rest = self.paths
        total = first(x)
        for path in rest:
            total = total + path(x)
        return torch.relu(total), total


class LastActivated(nn.Module):
    """Replaces the pair by twice the activated tensor, which the last head reads."""

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the first tensor twice."""
        return state[0], state[0]


class PairNetwork(MultiExitNetwork):
    """The cascade of a ResNet; its heads read the sum before its ReLU."""

    def view(self, state: Any) -> Tensor:
        """Return the second tensor of the pair."""
        tensor: Tensor = state[1]
        return tensor

    def with_view(self, state: Any, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pair of a sum: later stages read its first tensor, the sum after its ReLU."""
        return torch.relu(tensor), tensor


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


@dataclass(frozen=True)
class ResNet(ShallowDeep):
    """ResNet-56 with internal classifiers, 7 exits (Kaya et al., ICML 2019; Meta-GF table 4)."""

    family: ClassVar[str] = "sdn-resnet"
    network: ClassVar[type[MultiExitNetwork]] = PairNetwork
    usual: ClassVar[tuple[int, ...]] = (3, 7, 11, 15, 19, 23)
    sizes: ClassVar[tuple[str, ...]] = ("blocks", "channels")

    blocks: tuple[int, int, int] = setting((9, 9, 9), "blocks at each of the three map sizes")
    channels: int = setting(16, "width at the first map size; it doubles at each following one")

    def trunk(self, input_shape: tuple[int, int, int], num_classes: int) -> Trunk:
        """See `ShallowDeep.trunk`."""
        widths = [self.channels, 2 * self.channels, 4 * self.channels]
        units: list[nn.Module] = []
        for inputs, outputs, stride in _widths(self.blocks, widths, self.channels):
            path = nn.Sequential(*_conv_bn(inputs, outputs, 3, stride), nn.ReLU(), *_conv_bn(outputs, outputs, 3))
            changes = stride > 1 or inputs != outputs
            shortcut = nn.Sequential(*_conv_bn(inputs, outputs, 1, stride)) if changes else nn.Identity()
            units.append(Activated(path, shortcut))
        stem = Activated(nn.Sequential(*_conv_bn(input_shape[0], self.channels, 3)))
        return Trunk([stem], units, [LastActivated()], pooled_head(widths[-1], num_classes))

    def init_released(self, module: nn.Module) -> None:
        """Initialise convolutions from N(0, 2 / (k*k*outputs))."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class PreActivated(nn.Module):
    """WideResNet block, with normalisation and activation before each convolution instead of after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        first = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, padding=1), nn.Dropout(dropout)]
        second = [nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, stride, 1)]
        self.path = nn.Sequential(*first, *second)
        changes = stride > 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the path and the shortcut."""
        total: Tensor = self.path(x) + self.shortcut(x)
        return total


@dataclass(frozen=True)
class WideResNet(ShallowDeep):
    """WideResNet-32-4 with internal classifiers, 7 exits (Kaya et al., ICML 2019)."""

    family: ClassVar[str] = "sdn-wrn"
    usual: ClassVar[tuple[int, ...]] = (2, 4, 6, 8, 10, 12)
    sizes: ClassVar[tuple[str, ...]] = ("blocks", "widen")

    blocks: tuple[int, int, int] = setting((5, 5, 5), "blocks at each of the three map sizes")
    widen: int = setting(4, "width at the first map size, in multiples of 16; it doubles at each following one")
    dropout: float = setting(0.3, "dropout probability inside a block")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; expected a share of at least 0 and below 1")

    def trunk(self, input_shape: tuple[int, int, int], num_classes: int) -> Trunk:
        """See `ShallowDeep.trunk`."""
        widths = [16 * self.widen, 32 * self.widen, 64 * self.widen]
        units: list[nn.Module] = [PreActivated(*row, self.dropout) for row in _widths(self.blocks, widths, 16)]
        head = pooled_head(widths[-1], num_classes, nn.BatchNorm2d(widths[-1]), nn.ReLU())
        return Trunk([nn.Conv2d(input_shape[0], 16, 3, padding=1)], units, [], head)

    def init_released(self, module: nn.Module) -> None:
        """Initialise convolutions from N(0, 2 / (k*k*outputs)), and biases of linear layers to 0."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class MobileNet(ShallowDeep):
    """MobileNet with internal classifiers, 6 exits (Kaya et al., ICML 2019)."""

    family: ClassVar[str] = "sdn-mobilenet"
    usual: ClassVar[tuple[int, ...]] = (2, 4, 6, 8, 11)
    sizes: ClassVar[tuple[str, ...]] = ("channels",)
    positions: ClassVar[tuple[str, ...]] = ("halving",)

    channels: tuple[int, ...] = setting(
        (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024), "width of each unit"
    )
    halving: tuple[int, ...] = setting((1, 3, 5, 11), "units (from 0) that halve the map")

    def trunk(self, input_shape: tuple[int, int, int], num_classes: int) -> Trunk:
        """See `ShallowDeep.trunk`."""
        units: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise((32, *self.channels))):
            depthwise = nn.Conv2d(inputs, inputs, 3, 2 if index in self.halving else 1, 1, groups=inputs, bias=False)
            unit = [depthwise, nn.BatchNorm2d(inputs), nn.ReLU(), *conv_bn_relu(inputs, outputs, 1)]
            units.append(nn.Sequential(*unit))
        stem = conv_bn_relu(input_shape[0], 32, 3)
        return Trunk([stem], units, [], pooled_head(self.channels[-1], num_classes))


preset(
    VGG,
    "VGG, 4 exits, 52,486 parameters, for the default data (from no paper)",
    ((1, 16, 16), 10),
    name="sdn-tiny",
    channels=(1, 2, 8, 16, 32, 32),
    pools=(0, 2, 4),
    hidden=(128, 128),
    exits=(0, 2, 4),
)
