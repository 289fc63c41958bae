"""timm's classification networks with exits attached: `timm:convnextv2_atto`."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from exitkit.data.preprocessing import Interpolation, Preprocessing
from exitkit.errors import Note, UserError, unknown
from exitkit.networks.attach.exits import attach_exits
from exitkit.networks.attach.heads import HEAD, HEAD_WIDTH, HeadChoice, HeadForm
from exitkit.networks.attach.libraries import library, shortened
from exitkit.networks.attach.torchvision import SHARES
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.families.base import IMAGENET, Backbone, Home
from exitkit.plugins import setting

FEATURES = "features"
"""In place of points: the ends of the network's own stages."""


@dataclass(frozen=True)
class TimmModel(Backbone):
    """Any timm classifier with exits at named points, at shares of its cost, or at the ends of its stages."""

    home: ClassVar[Home] = IMAGENET
    named_by: ClassVar[str] = "model"

    model: str = setting("resnet18", "timm's name of the network, with or without a tag of weights (resnet18.a1_in1k)")
    exits: tuple[str, ...] | None = setting(
        None, "points after which exits are placed, or features: the ends of the network's stages; none: by fractions"
    )
    fractions: tuple[float, ...] | None = setting(
        None, "shares of the cost at which exits are placed; none: 0.25,0.5,0.75, unless exits is set"
    )
    head: HeadForm = setting("auto", HEAD)
    head_width: int | None = setting(None, HEAD_WIDTH)
    pretrained: bool = setting(False, "timm's published weights, which are downloaded")
    weights: str | None = setting(None, "file of weights that timm has saved or published (.safetensors, .pth)")
    dropout: float | None = setting(None, "rate of dropout before the network's own classifier; none: timm's")
    drop_path: float | None = setting(None, "rate of stochastic depth; none: timm's")

    def __post_init__(self) -> None:
        if self.exits is not None and self.fractions is not None:
            raise UserError("exits and fractions both place the exits; give one of them, and leave the other at none")
        if self.pretrained and self.weights is not None:
            raise UserError("pretrained and weights both give initial weights; set one of them")
        for name in ("dropout", "drop_path"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise UserError(f"{name} is {rate}; expected a rate of at least 0 and below 1")
        HeadChoice(self.head, self.head_width)

    def _check_name(self) -> None:
        """Check the name when it is used: a list of all networks must not load timm, or need it.

        Raises:
            UserError: timm is not installed, or has no such network or weights.
        """
        timm = library("timm")
        base, _, tag = self.model.partition(".")
        if not timm.is_model(base):
            raise unknown("timm model", base, timm.list_models())
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")]
        if tag and tag not in tags:
            raise unknown(f"weights of {base}", tag, set(tags))
        if self.pretrained and not tags:
            raise UserError(
                f"timm publishes no weights of {base}; give a file by weights, or leave pretrained at false"
            )

    def weights_files(self) -> tuple[str, ...]:
        """See `Backbone.weights_files`."""
        return () if self.weights is None else (self.weights,)

    def without_weights(self) -> TimmModel:
        """See `Backbone.without_weights`."""
        return dataclasses.replace(self, pretrained=False, weights=None)

    @property
    def _published(self) -> Any:
        """timm's description of the network's published weights; also known for networks without any."""
        return library("timm", "models").get_pretrained_cfg(self.model)

    def preprocessing(self) -> Preprocessing | None:
        """Return how timm prepares the images of the published weights, which hold for a file of weights as well."""
        self._check_name()
        if not self.pretrained and self.weights is None:
            return None
        published, usual = self._published, Preprocessing()
        how: dict[str, Interpolation] = {"bicubic": "bicubic", "nearest": "nearest"}
        size, crop = published.input_size[-1], published.crop_pct or usual.crop
        resized = math.floor(size / crop + 1e-6)  # timm rounds down
        return Preprocessing(
            size,
            tuple(published.mean or usual.mean),
            tuple(published.std or usual.std),
            crop if round(size / crop) == resized else size / resized,
            how.get(published.interpolation, "bilinear"),
        )

    def build(self, input_shape: tuple[int, int, int], num_classes: int) -> MultiExitNetwork:
        """Build the network; see `Backbone.build`. Images of other than 3 channels change its first layer."""
        self._check_name()
        model = self._make(input_shape, num_classes)
        at, fractions = self.exits, self.fractions
        if at == (FEATURES,):
            at = self._features(model)
        elif at is None and fractions is None:
            fractions = SHARES
        head = HeadChoice(self.head, self.head_width)
        network = attach_exits(model, at, fractions, input_shape=input_shape, head=head, check=False)
        network.family = "timm"
        return network

    def _features(self, model: nn.Module) -> tuple[str, ...]:
        """Return the ends of the network's stages but the last, whose exit would be the network's own."""
        points = tuple(stage["module"] for stage in getattr(model, "feature_info", None) or ())[:-1]
        if not points:
            raise UserError(f"timm names no stages of {self.model}; give points by exits, or fractions")
        return points

    def _make(self, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        channels, height, width = input_shape
        arguments: dict[str, Any] = {"in_chans": channels, "num_classes": num_classes}
        if self._published.fixed_input_size:
            arguments["img_size"] = (height, width)
        if self.dropout is not None:
            arguments["drop_rate"] = self.dropout
        if self.drop_path is not None:
            arguments["drop_path_rate"] = self.drop_path
        if self.pretrained or self.weights is not None:
            arguments |= {"pretrained": True, "num_classes": self._published.num_classes}
        if self.weights is not None:
            tensors = read_weights(self.weights)
            arguments["num_classes"] = self._classes(tensors)
            overlay = {"state_dict": tensors, "num_classes": arguments["num_classes"]}
            arguments["pretrained_cfg_overlay"] = overlay
        made = self._create(arguments)
        self._note_patches(made, height, width)
        classifier: Any = made
        if classifier.num_classes != num_classes:  # the weights have fitted as they are; the classifier is made anew
            classifier.reset_classifier(num_classes)
        return made

    def _note_patches(self, model: nn.Module, height: int, width: int) -> None:
        """Note that images are no whole patches: timm's patch embedding does not read the rest."""
        embed: Any = getattr(model, "patch_embed", None)
        if not isinstance(embed, library("timm", "layers").PatchEmbed) or embed.dynamic_img_pad:
            return
        rows, columns = embed.patch_size
        if height % rows or width % columns:
            text = f"{self.model} reads patches of {rows}x{columns} pixels, and of images of {height}x{width} only"
            whole = f"{height // rows * rows}x{width // columns * columns}"
            warnings.warn(Note(f"{text} {whole}; multiples of the patches lose nothing"), stacklevel=2)

    def _classes(self, tensors: dict[str, Tensor]) -> int:
        """Return the number of classes of a file of weights."""
        published = self._published
        names = published.classifier
        name = names if isinstance(names, str) else next(iter(names or ()), "")
        classifier = tensors.get(f"{name}.weight")
        classes: int = published.num_classes if classifier is None else len(classifier)
        return classes

    def _create(self, arguments: dict[str, Any]) -> nn.Module:
        """Make timm's network.

        Raises:
            UserError: timm can't build it for such images, or the weights can't be downloaded or do not fit.
        """
        device, create = torch.get_default_device(), library("timm").create_model
        try:
            try:
                made: nn.Module = create(self.model, **arguments)
            except NotImplementedError:  # some networks compute their widths with tensors, which need storage
                with torch.device("cpu"):
                    made = create(self.model, **arguments)
        except Exception as error:  # timm, its hub and a file of weights may raise any error
            reason = shortened(error)
            if "pretrained" not in arguments:
                raise UserError(f"timm can't build this {self.model} ({reason})") from error
            source = "published weights of" if self.weights is None else f"weights {self.weights} for"
            raise UserError(f"the {source} {self.model} can't be loaded ({reason})") from error
        return made.to(device)


def read_weights(file: str) -> dict[str, Tensor]:
    """Return the tensors of a file that timm has saved: averaged weights if it has them, without names of wrappers.

    Args:
        file: `.safetensors`, or a file of `torch.save`, of which only tensors are read.

    Raises:
        UserError: the file does not exist, can't be read, or holds other than tensors.
    """
    if not Path(file).is_file():
        raise UserError(f"weights is {file}, which is no file; expected a .safetensors or .pth file")
    try:
        tensors = library("timm", "models").load_state_dict(file, weights_only=True)
    except Exception as error:  # readers raise errors of many types for damaged files
        raise UserError(f"weights {file} can't be read ({shortened(error)})") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"weights {file} holds no tensors by name; expected the state_dict of a timm network")
    return tensors
