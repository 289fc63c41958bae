"""Checks of a network that a script hands over, and of the images that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from exitkit.errors import UserError
from exitkit.networks.cascade import MultiExitNetwork

LARGEST_SIDE = 16_384
"""Largest number of channels, and of pixels of a side, of an input."""

MADE = "exitkit.attach_exits makes one of a model, exitkit.build_network of a name"


def check_cascade(network: Any) -> None:
    """Check that a network is a cascade.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(network, MultiExitNetwork):
        raise UserError(f"network is a {type(network).__name__}; expected a MultiExitNetwork ({MADE})")


def check_shape(shape: Any) -> None:
    """Check that a shape is (channels, height, width).

    Raises:
        UserError: it is something else.
    """
    sizes = tuple(shape) if isinstance(shape, Sequence) else ()
    if len(sizes) != 3 or not all(isinstance(size, Integral) and 0 < int(size) <= LARGEST_SIDE for size in sizes):
        raise UserError(f"input_shape is {shape!r:.80}; expected (channels, height, width), each 1 to {LARGEST_SIDE}")


def reference_tensor(network: nn.Module) -> Tensor:
    """Return a tensor with the type and device of the network: its first parameter of floating point."""
    return next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))


def check_images(images: Any, shape: tuple[int, int, int], reference: Tensor) -> None:
    """Check that images are a tensor [B, *shape].

    Args:
        images: the images.
        shape: the network's `input_shape`.
        reference: see `reference_tensor`.

    Raises:
        UserError: they are not, or have another type or device than `reference`.
    """
    expected = f"[B, {', '.join(map(str, shape))}]"
    if not isinstance(images, Tensor):
        raise UserError(f"images are a {type(images).__name__}; expected a tensor {expected} of {reference.dtype}")
    if images.dtype != reference.dtype:
        remedy = " (images.float() / 255, normalised as for training)" if images.dtype == torch.uint8 else ""
        raise UserError(f"images are {images.dtype}; expected {reference.dtype}, as the network{remedy}")
    if images.shape[1:] != tuple(shape):
        one = " (of a single image: image[None])" if images.shape == tuple(shape) else ""
        raise UserError(f"images have the shape {list(images.shape)}; expected {expected}{one}")
    if images.device != reference.device:
        raise UserError(f"images are on {images.device}; expected {reference.device}, as the network")
