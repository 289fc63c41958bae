"""Exits on torchvision's classification models, of every family."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from exitkit.backbones.attach import attach_exits
from exitkit.backbones.base import IMAGENET, Backbone, Home
from exitkit.data.torchvision_import import torchvision
from exitkit.errors import UserError, unknown
from exitkit.network import MultiExitNetwork
from exitkit.plugins import setting

FRACTIONS = (0.25, 0.5, 0.75)
_IMAGENET_CLASSES = 1000


class Colours(nn.Module):
    """Shows a grey image [B, 1, H, W] to a network of colours: [B, 3, H, W], all alike."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the image three times."""
        return x.expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class TorchvisionModel(Backbone):
    """Any classification model of torchvision with exits attached; `torchvision:resnet18` names one."""

    home: ClassVar[Home] = IMAGENET
    named_by: ClassVar[str] = "model"

    model: str = setting("resnet18", "name of the model in torchvision")
    exits: tuple[str, ...] | None = setting(None, "points behind which exits stand, such as layer1,layer2,layer3")
    fractions: tuple[float, ...] | None = setting(
        None, "place the exits at these shares of the cost; with no exits either: 0.25,0.5,0.75"
    )
    weights: str | None = setting(
        None, "torchvision's name of trained weights (DEFAULT: the best); the classifier is new if the classes differ"
    )

    def __post_init__(self) -> None:
        if self.exits is not None and self.fractions is not None:
            raise UserError("exits and fractions both say where the exits stand; give one of them")

    def build(self, input_shape: tuple[int, int, int], num_classes: int) -> MultiExitNetwork:
        """Build it; see `Backbone.build`."""
        channels, height, width = input_shape
        if channels not in (1, 3):
            raise UserError(
                f"images have {channels} channels; torchvision's models read 3 (1 is shown to them as grey)"
            )
        model = self._model((height, width), num_classes)
        shares = None if self.exits is not None else self.fractions or FRACTIONS
        network = attach_exits(model.train(), self.exits, shares, input_shape=(3, height, width))
        if channels == 1:
            network.stages[0] = nn.Sequential(Colours(), network.stages[0])
            network.input_shape = input_shape
        return network

    def _model(self, size: tuple[int, int], num_classes: int) -> nn.Module:
        models = torchvision("models")
        names = models.list_models(module=models)
        if self.model not in names:
            raise unknown("torchvision model", self.model, names)
        options: dict[str, Any] = {"num_classes": num_classes}
        if self.model.startswith("vit_"):
            options["image_size"] = size[0]
        if self.model.startswith("maxvit"):
            options["input_size"] = size
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # on how some will start otherwise
                model: nn.Module = models.get_model(self.model, weights=None, **options)
        except (ValueError, AssertionError) as error:  # sizes that its patches or windows don't divide
            raise UserError(f"{self.model} can't be made for images of {size[0]}x{size[1]}: {error}") from error
        if self.weights is not None:
            self._load(model, num_classes)
        return model

    def _load(self, model: nn.Module, num_classes: int) -> None:
        known = torchvision("models").get_model_weights(self.model)
        if self.weights not in known.__members__:
            raise unknown(f"weights of {self.model}", str(self.weights), known.__members__)
        try:
            trained = known[self.weights].get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network, a full disk, a file that is not what it should be
            raise UserError(f"the weights {self.weights} of {self.model} can't be had: {error}") from error
        own = model.state_dict()
        if num_classes != _IMAGENET_CLASSES:
            trained = {name: value for name, value in trained.items() if value.shape == own[name].shape}
        model.load_state_dict(trained, strict=num_classes == _IMAGENET_CLASSES)
