"""Torchvision's classification networks with exits attached: `torchvision:resnet18`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from exitkit.data.preprocessing import Preprocessing
from exitkit.data.torchvision_import import torchvision
from exitkit.errors import UserError, unknown
from exitkit.networks.attach.exits import attach_exits
from exitkit.networks.attach.heads import HEAD, HEAD_WIDTH, HeadChoice, HeadForm
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.families.base import IMAGENET, Backbone, Home
from exitkit.plugins import setting

SHARES = (0.25, 0.5, 0.75)
"""Default placement of the exits, as shares of the multiply-adds."""


@dataclass(frozen=True)
class TorchvisionModel(Backbone):
    """Any torchvision classifier with exits at named points or at shares of its cost."""

    home: ClassVar[Home] = IMAGENET
    named_by: ClassVar[str] = "model"

    model: str = setting("resnet18", "torchvision's name of the network")
    exits: tuple[str, ...] | None = setting(None, "points after which exits are placed; none: by fractions")
    fractions: tuple[float, ...] | None = setting(
        None, "shares of the cost at which exits are placed; none: 0.25,0.5,0.75, unless exits is set"
    )
    weights: str | None = setting(
        None, "pretrained weights, such as DEFAULT; for other than 1000 classes the last layer is reinitialised"
    )
    head: HeadForm = setting("linear", HEAD, added=True)
    head_width: int | None = setting(None, HEAD_WIDTH, added=True)

    def __post_init__(self) -> None:
        HeadChoice(self.head, self.head_width)
        if self.exits is not None and self.fractions is not None:
            raise UserError("exits and fractions both place the exits; give one of them, and leave the other at none")
        known = _names()
        if self.model not in known:
            raise unknown("torchvision model", self.model, known)
        if self.weights is not None:
            choices = [*torchvision("models").get_model_weights(self.model).__members__, "DEFAULT"]
            if self.weights not in choices:
                raise unknown(f"weights of {self.model}", self.weights, set(choices))

    def preprocessing(self) -> Preprocessing | None:
        """Return how torchvision prepares the images of the pretrained weights."""
        if self.weights is None:
            return None
        known = torchvision("models").get_model_weights(self.model)[self.weights].transforms()
        (size,), (resized,) = known.crop_size, known.resize_size
        return Preprocessing(size, tuple(known.mean), tuple(known.std), size / resized, known.interpolation.value)

    def build(self, input_shape: tuple[int, int, int], num_classes: int) -> MultiExitNetwork:
        """Build the network; see `Backbone.build`. Images of one channel are repeated to three channels."""
        channels, *size = input_shape
        if channels not in (1, 3):
            raise UserError(f"the images have {channels} channels; expected 3, or 1 that is repeated")
        sizes = self._sizes(size[0], size[1])
        model = self._fresh(num_classes, sizes) if self.weights is None else self._pretrained(num_classes, sizes)
        fractions = SHARES if self.exits is None and self.fractions is None else self.fractions
        head, shape = HeadChoice(self.head, self.head_width), (3, size[0], size[1])
        network = attach_exits(model, self.exits, fractions, input_shape=shape, head=head, check=False)
        network.family, network.input_shape = "torchvision", input_shape
        if channels == 1:
            repeat_channels(network.stages[0])
        return network

    def _sizes(self, height: int, width: int) -> dict[str, Any]:
        """Return the arguments of models that accept one size of images only."""
        if self.model.startswith("maxvit"):
            return {"input_size": (height, width)}
        if not self.model.startswith("vit_"):
            return {}
        patch = int(self.model.rsplit("_", 1)[1])
        if height != width or height % patch:
            raise UserError(
                f"the images are {height}x{width}; {self.model} expects square images, with a side that is a multiple "
                f"of {patch}"
            )
        return {"image_size": height}

    def _fresh(self, num_classes: int, sizes: dict[str, Any]) -> nn.Module:
        # Auxiliary classifiers run in training only; without `init_weights` these two models warn.
        auxiliary = {"aux_logits": False, "init_weights": True} if self.model in ("googlenet", "inception_v3") else {}
        return self._make(num_classes=num_classes, **sizes, **auxiliary)

    def _pretrained(self, num_classes: int, sizes: dict[str, Any]) -> nn.Module:
        weights = torchvision("models").get_model_weights(self.model)[self.weights]
        published = len(weights.meta["categories"])
        model = self._make(weights=weights, **sizes)
        if num_classes != published:
            _replace_classifier(model, published, num_classes)
        return model

    def _make(self, **arguments: Any) -> nn.Module:
        make = torchvision("models").get_model
        device = torch.get_default_device()
        try:
            try:
                made: nn.Module = make(self.model, **arguments)
            except NotImplementedError:  # RegNet computes its widths with tensors, which need storage
                with torch.device("cpu"):
                    made = make(self.model, **arguments)
        except OSError as error:  # a failed download raises it, too
            reason = " ".join(str(error).split())
            raise UserError(f"the weights {self.weights} of {self.model} can't be loaded ({reason})") from error
        except (ValueError, AssertionError) as error:
            raise UserError(f"torchvision can't build this {self.model} ({' '.join(str(error).split())})") from error
        return made.to(device)


def _names() -> list[str]:
    models = torchvision("models")
    names: list[str] = models.list_models(module=models)
    return names


def _replace_classifier(model: nn.Module, published: int, num_classes: int) -> None:
    """Replace the last layer with one output per published class by a new layer for `num_classes` classes."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    name = [name for name, layer in layers.items() if layer.weight.shape[0] == published][-1]
    old = layers[name]
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    else:  # SqueezeNet
        new = nn.Conv2d(old.in_channels, num_classes, old.kernel_size)  # type: ignore[arg-type]
    model.set_submodule(name, new)


def repeat_channels(stage: nn.Module) -> None:
    """Make a stage for three channels accept images of one channel; the names of its modules do not change."""
    assert isinstance(stage, torch.fx.GraphModule)
    images = next(iter(stage.graph.nodes))
    readers = list(images.users)
    with stage.graph.inserting_after(images):
        repeated = stage.graph.call_method("expand", (images, -1, 3, -1, -1))
    for reader in readers:
        reader.replace_input_with(images, repeated)
    stage.recompile()
