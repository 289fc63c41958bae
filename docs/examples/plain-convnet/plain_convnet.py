"""A network family of one's own: a chain of convolutions, with an exit after each."""

from dataclasses import dataclass

from torch import nn

from exitkit.networks import (
    Backbone,
    Head,
    MultiExitNetwork,
    UserError,
    preset,
    setting,
)


@dataclass(frozen=True)
class PlainConvNet(Backbone):
    """Plain convolutions, with an exit after each."""

    widths: tuple[int, ...] = setting(
        (16, 32, 64), "channels of each stage; every stage halves the feature map"
    )

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise UserError(
                f"widths is {self.widths}; expected at least one width, each at least 1"
            )

    def build(
        self, input_shape: tuple[int, int, int], num_classes: int
    ) -> MultiExitNetwork:
        """Build it; see `Backbone.build`."""
        stages, heads, before = [], [], input_shape[0]
        for width in self.widths:
            stages.append(
                nn.Sequential(
                    nn.Conv2d(before, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()
                )
            )
            pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            heads.append(Head(embed=pool, classify=nn.Linear(width, num_classes)))
            before = width
        return MultiExitNetwork(stages, heads, input_shape, num_classes)


preset(
    PlainConvNet,
    "Four wide stages",
    name="plain-convnet-wide",
    widths=(32, 64, 128, 256),
)
