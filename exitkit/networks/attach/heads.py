"""Heads for the exits of any network, by name: for tokens, for maps, or for both.

| name | features | head |
|---|---|---|
| `linear` | any | mean over all positions, linear layer |
| `norm` | any | layer normalisation, mean over all positions, linear layer |
| `class-token` | tokens | layer normalisation of the first token, linear layer |
| `sdn` | maps | pooling to 4x4 by a learned mix of maximum and average, linear layer (Kaya et al., ICML 2019) |
| `msdnet` | maps | two 3x3 convolutions of stride 2, average, linear layer (Huang et al., ICLR 2018) |
| `auto` | any | `norm` for tokens, `linear` for all others |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from exitkit.errors import UserError, unknown
from exitkit.networks.cascade import Head
from exitkit.networks.families.layers import conv_bn_relu
from exitkit.networks.families.sdn import internal_classifier

HeadForm = Literal["auto", "linear", "norm", "class-token", "sdn", "msdnet"]
FORMS = ("auto", "linear", "norm", "class-token", "sdn", "msdnet")

HEAD = (
    "heads of the new exits: linear (mean, linear layer), norm (layer norm, mean, linear layer), class-token (layer "
    "norm of the first token, linear layer), sdn or msdnet (those papers', for maps); auto: norm for tokens, otherwise "
    "linear"
)
HEAD_WIDTH = "width of the convolutions of the head msdnet; none: 128"


class Pooled(nn.Module):
    """Mean over all dimensions but the batch and the channels: [B, ..., C, ...] -> [B, C].

    Args:
        axis: dimension of the channels.
        dims: number of dimensions, the batch included.
    """

    def __init__(self, axis: int, dims: int) -> None:
        super().__init__()
        self.over = [dim for dim in range(1, dims) if dim != axis]

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of x."""
        return x.mean(self.over) if self.over else x

    def extra_repr(self) -> str:
        """Return the averaged dimensions."""
        return f"over={self.over}"


class MovedChannels(nn.Module):
    """Moves the channels to another dimension: [B, ..., C, ...].

    Args:
        axis: dimension of the channels.
        to: their dimension in the result.
    """

    def __init__(self, axis: int, to: int) -> None:
        super().__init__()
        self.axis, self.to_axis = axis, to

    def forward(self, x: Tensor) -> Tensor:
        """Return x with its channels moved."""
        return x.movedim(self.axis, self.to_axis)

    def extra_repr(self) -> str:
        """Return the dimensions."""
        return f"axis={self.axis}, to={self.to_axis}"


class FirstToken(nn.Module):
    """The first token: [B, N, C] -> [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the first token of each image."""
        return x[:, 0]


@dataclass(frozen=True)
class HeadChoice:
    """A head by name.

    Attributes:
        form: its name.
        width: width of the convolutions of `msdnet`; None: 128.

    Raises:
        UserError: an unknown name, or a width that is not positive or that the head does not have.
    """

    form: HeadForm = "auto"
    width: int | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown("head", self.form, FORMS)
        if self.width is not None and self.form != "msdnet":
            raise UserError(f"head_width is {self.width}, but the head {self.form} has no convolutions; use msdnet")
        if self.width is not None and self.width < 1:
            raise UserError(f"head_width is {self.width}; expected at least 1")

    def make(self, shape: tuple[int, ...], classes: int, axis: int, point: str) -> Head:
        """Return the head for features [B, *shape].

        Args:
            shape: shape of one image's features.
            classes: width of the logits.
            axis: dimension of the channels, counted with the batch.
            point: name of the exit's point, for messages.

        Raises:
            UserError: the head does not read such features.
        """
        channels, dims = shape[axis - 1], len(shape) + 1
        form = self.form if self.form != "auto" else "norm" if dims == 3 else "linear"
        wanted = {"class-token": (3, "tokens"), "sdn": (4, "maps"), "msdnet": (4, "maps")}
        if dims > 4:
            raise UserError(f"the features at {point} have shape {shape}; give a head for them by head=...")
        if form in wanted and wanted[form][0] != dims:
            others = {2: "linear or norm", 3: "linear, norm or class-token", 4: "linear, norm, sdn or msdnet"}[dims]
            raise UserError(
                f"the head {form} reads {wanted[form][1]}; the features at {point} have shape {shape}, expected the "
                f"head {others}"
            )
        if form == "linear":
            pool: nn.Module = Pooled(axis, dims) if dims > 2 else nn.Identity()
            return Head(pool, nn.Linear(channels, classes))
        if form in ("norm", "class-token"):
            steps = [nn.LayerNorm(channels), Pooled(dims - 1, dims)]
            if form == "class-token":
                steps = [FirstToken(), nn.LayerNorm(channels)]
            return Head(nn.Sequential(*moved(axis, dims - 1), *steps), nn.Linear(channels, classes))
        height, width = (size for place, size in enumerate(shape, 1) if place != axis)
        head = internal_classifier((channels, height, width), classes)
        if form == "msdnet":
            inner = self.width or 128
            convolutions = [conv_bn_relu(channels, inner, 3, 2), conv_bn_relu(inner, inner, 3, 2)]
            pool = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
            head = Head(pool, nn.Linear(inner, classes), before_pooling=0 if moved(axis, 1) else 2)
        return Head(nn.Sequential(*moved(axis, 1), head.embed), head.classify) if moved(axis, 1) else head


def moved(axis: int, to: int) -> list[nn.Module]:
    """Return the module that moves the channels, or none if they are there already."""
    return [] if axis == to else [MovedChannels(axis, to)]
