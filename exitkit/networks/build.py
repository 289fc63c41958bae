"""Construction of networks by the names of their backbones."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from exitkit import plugins
from exitkit.errors import UserError
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.families.base import Backbone, home
from exitkit.networks.inputs import check_shape

_TOO_LARGE = ("allocate memory", "Overflow", "out of memory", "Storage size calculation overflowed")
"""Parts of torch's error messages for tensors that do not fit into memory."""


def make_backbone(name: str, settings: Mapping[str, Any]) -> Backbone:
    """Return the backbone called `name` with these settings; its `build` makes a network.

    Raises:
        UserError: an unknown name or field, an invalid value, or a class that is not that of a backbone.
    """
    backbone: Backbone = plugins.configure("backbone", name, settings)
    lacks = [part for part in ("build", "home") if not hasattr(backbone, part)]
    if lacks or type(backbone).build is Backbone.build:
        missing = lacks[0] if lacks else "build"
        raise UserError(
            f"backbone {name} has no {missing}; expected a subclass of exitkit.networks.families.base.Backbone"
        )
    return backbone


def build_network(
    name: str,
    *,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    **settings: Any,
) -> MultiExitNetwork:
    """Build a network by the name of its backbone.

    Args:
        name: a backbone or preset, as listed by `exitkit list backbones`.
        num_classes: width of the logits; by default as published for the backbone or preset.
        input_shape: (channels, height, width) of the images; by default as published for the backbone or preset.
        settings: fields of the backbone.

    Raises:
        UserError: an unknown name or field, or settings that give no valid network.
    """
    return build_backbone(make_backbone(name, settings), name, num_classes, input_shape)


def build_backbone(
    backbone: Backbone, name: str, num_classes: int | None, input_shape: tuple[int, int, int] | None
) -> MultiExitNetwork:
    """Build the network of a backbone with settings; see `build_network`."""
    home_shape, home_classes = home(plugins.load("backbone", name))
    classes = home_classes if num_classes is None else num_classes
    if not isinstance(classes, Integral):
        raise UserError(f"num_classes is {classes!r}; expected a whole number")
    if classes < 2:
        raise UserError(f"num_classes is {classes}; expected at least 2")
    shape = home_shape if input_shape is None else input_shape
    check_shape(shape)
    try:
        return backbone.build(shape, classes)
    except (MemoryError, RuntimeError, TypeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _TOO_LARGE):
            raise
        raise UserError(
            f"backbone {name} does not fit into memory with these settings; expected smaller ones"
        ) from None
