"""Image classifiers of transformers with exits between their blocks: `transformers:FOLDER`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

# Before Python 3.12 pydantic takes no other.
from typing_extensions import TypedDict

from exitkit.data.preprocessing import Interpolation, Preprocessing
from exitkit.errors import UserError
from exitkit.files import checked, read_json
from exitkit.networks.attach.blocks import find_blocks
from exitkit.networks.attach.exits import attach_exits
from exitkit.networks.attach.heads import HEAD, HEAD_WIDTH, HeadChoice, HeadForm
from exitkit.networks.attach.libraries import library, shortened
from exitkit.networks.attach.torchvision import SHARES, repeat_channels
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.families.base import IMAGENET, Backbone, Home
from exitkit.plugins import setting

_IRRELEVANT = ("id2label", "label2id", "transformers_version", "dtype", "torch_dtype", "_name_or_path")
"""Entries of a configuration that do not determine the network."""
_EXPECTED = "expected transformers:FOLDER, a folder that save_pretrained has written"


@dataclass(frozen=True)
class TransformersModel(Backbone):
    """An image classifier that transformers has saved in a folder, with exits between its blocks."""

    home: ClassVar[Home] = IMAGENET
    named_by: ClassVar[str] = "folder"

    folder: str = setting("", "folder that `save_pretrained` has written, with config.json and weights")
    exits: tuple[int, ...] | None = setting(
        None, "numbers of the blocks (from 0) after which exits are placed; none: by fractions"
    )
    fractions: tuple[float, ...] | None = setting(
        None, "shares of the cost at which exits are placed; none: 0.25,0.5,0.75, unless exits is set"
    )
    blocks: str | None = setting(None, "path of the list of blocks, with * for any name; none: the largest list")
    head: HeadForm = setting("auto", HEAD)
    head_width: int | None = setting(None, HEAD_WIDTH)
    pretrained: bool = setting(True, "start from the folder's weights; false: from random ones")
    config: str | None = setting(None, "the folder's configuration, as JSON; set by exitkit")

    def __post_init__(self) -> None:
        if self.exits is not None and self.fractions is not None:
            raise UserError("exits and fractions both place the exits; give one of them, and leave the other at none")
        HeadChoice(self.head, self.head_width)
        if self.config is None and self.folder:  # a finished run has it, and does not need the folder
            object.__setattr__(self, "config", _configuration(self.folder))
        elif self.config is not None:
            _check_configuration(self.config)

    def weights_files(self) -> tuple[str, ...]:
        """See `Backbone.weights_files`."""
        return (self.folder,) if self.pretrained and self.folder else ()

    def without_weights(self) -> TransformersModel:
        """See `Backbone.without_weights`."""
        return dataclasses.replace(self, pretrained=False)

    def preprocessing(self) -> Preprocessing | None:
        """Return how the folder's image processor prepares images, for networks that start from its weights."""
        if not self.pretrained or self.config is None:
            return None
        size = json.loads(str(self.config)).get("image_size")
        usual = Preprocessing(size) if isinstance(size, int) else Preprocessing()
        path = Path(self.folder) / "preprocessor_config.json"
        return _preprocessing(checked(path, _Processor, read_json(path)), usual) if path.is_file() else usual

    def build(self, input_shape: tuple[int, int, int], num_classes: int) -> MultiExitNetwork:
        """Build the network; see `Backbone.build`. Images of one channel are repeated where it expects three."""
        if self.config is None:
            raise UserError(f"no folder is given; {_EXPECTED}")
        channels, height, width = input_shape
        model = self._make(input_shape, num_classes)
        expected = getattr(model.config, "num_channels", channels)
        if channels not in (1, expected):
            raise UserError(f"the images have {channels} channels; expected {expected}, or 1 that is repeated")
        blocks = self.blocks or find_blocks(model)
        if blocks is None:
            raise UserError(f"{type(model).__name__} has no list of blocks; give its path by blocks")
        fractions = SHARES if self.exits is None and self.fractions is None else self.fractions
        head, shape = HeadChoice(self.head, self.head_width), (expected, height, width)
        network = attach_exits(model, self.exits, fractions, blocks=blocks, input_shape=shape, head=head)
        network.family, network.input_shape = "transformers", input_shape
        if channels < expected:
            repeat_channels(network.stages[0])
        return network

    def _make(self, input_shape: tuple[int, int, int], num_classes: int) -> Any:
        """Make the network of transformers.

        Raises:
            UserError: it is no image classifier, or the weights do not fit.
        """
        transformers, device = library("transformers"), torch.get_default_device()
        values: dict[str, Any] = json.loads(str(self.config))
        if isinstance(values.get("image_size"), int):
            values["image_size"] = input_shape[1] if input_shape[1] == input_shape[2] else list(input_shape[1:])
        kind = values.pop("model_type")
        try:
            config = transformers.AutoConfig.for_model(kind, **values, num_labels=num_classes)
            classifier = transformers.AutoModelForImageClassification
            with _quiet(transformers):
                if not self.pretrained:
                    return classifier.from_config(config).to(device)
                model, info = classifier.from_pretrained(
                    self.folder,
                    config=config,
                    local_files_only=True,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except Exception as error:  # transformers may raise any error
            raise UserError(f"transformers can't make the network of {self.folder} ({shortened(error)})") from error
        self._check_loaded(model, info, num_classes)
        return model.to(device)

    def _check_loaded(self, model: nn.Module, info: Any, num_classes: int) -> None:
        """Check that the weights are those of the network; only its last layer may have other classes."""
        missing = sorted(info["missing_keys"])
        other = sorted(
            key
            for key, saved, made in info["mismatched_keys"]
            if made[0] != num_classes or tuple(saved)[1:] != tuple(made)[1:]
        )
        if missing or other:
            what = f"{missing[0]} is missing" if missing else f"{other[0]} has another shape"
            size = json.loads(str(self.config)).get("image_size")
            remedy = f"; its images are {size}x{size} (--set image_size={size})" if isinstance(size, int) else ""
            raise UserError(f"the weights of {self.folder} are not those of {type(model).__name__}: {what}{remedy}")


def _configuration(folder: str) -> str:
    """Return what determines the network of a folder's config.json, as JSON.

    Raises:
        UserError: there is no such file, or it is no configuration.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; {_EXPECTED}")
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UserError(f"{path} names no model_type; expected the configuration of a network of transformers")
    return json.dumps({key: value for key, value in values.items() if key not in _IRRELEVANT}, sort_keys=True)


def _check_configuration(text: str) -> None:
    """Check the field `config`, which a stranger's recipe may hold.

    Raises:
        UserError: it is no configuration as JSON.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UserError(f"config is {text!r:.80}; expected the configuration of a network of transformers, as JSON")


_RESAMPLING: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of ways to resize, which image processors use."""


_Side = Annotated[int, Field(ge=1, le=10**5)]
_Channels = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)]


class _Processor(TypedDict, total=False):
    """What is read of an image processor's preprocessor_config.json."""

    size: _Side | dict[str, Any] | None
    crop_size: _Side | dict[str, Any] | None
    do_center_crop: bool | None
    crop_pct: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    do_normalize: bool | None
    image_mean: _Channels | None
    image_std: _Channels | None
    resample: int | None


def _preprocessing(values: _Processor, usual: Preprocessing) -> Preprocessing:
    """Return the transform of an image processor, from its saved values."""
    resized, cropped = (_side(values.get(name)) for name in ("size", "crop_size"))
    if not values.get("do_center_crop"):
        cropped = None
    size = cropped or resized or usual.size
    crop = size / resized if cropped and resized else values.get("crop_pct") or 1.0
    normalised = values.get("do_normalize", True)
    return Preprocessing(
        size,
        tuple(values.get("image_mean") or usual.mean) if normalised else (0.0,) * 3,
        tuple(values.get("image_std") or usual.std) if normalised else (1.0,) * 3,
        min(crop, 1.0),
        "bilinear" if (way := values.get("resample")) is None else _RESAMPLING.get(way, "bilinear"),
    )


def _side(size: Any) -> int | None:
    """Return the side of square images: `224`, `{"height": 224, "width": 224}` or `{"shortest_edge": 256}`."""
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    return size if isinstance(size, int) else None


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence warnings about what is checked here, and progress bars."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
