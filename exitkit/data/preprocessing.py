"""How an image becomes the input of a network: size, crop, interpolation and normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from exitkit.data.torchvision_import import torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's images, of pixel values scaled to 0..1."""

Interpolation = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True)
class Preprocessing:
    """The transform of colour images of any size to inputs float32 [3, size, size].

    Attributes:
        size: height and width of the input.
        mean, std: per channel, of pixel values scaled to 0..1.
        crop: share of the shorter side that the centre crop keeps at evaluation; the papers' is 224 of 256 pixels.
        interpolation: how images are resized.
    """

    size: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    crop: float = 0.875
    interpolation: Interpolation = "bilinear"

    def __call__(self, image: Any, augment: bool) -> Tensor:
        """Transform one image.

        Args:
            image: a PIL image (RGB), or a uint8 tensor [3, H, W].
            augment: whether to crop and flip at random, as the papers do in training; otherwise the image is resized
                and its centre is cropped.
        """
        v2 = torchvision("transforms.v2")
        how = v2.InterpolationMode(self.interpolation)
        if augment:
            shape = [v2.RandomResizedCrop(self.size, interpolation=how), v2.RandomHorizontalFlip()]
        else:
            shape = [v2.Resize(round(self.size / self.crop), interpolation=how), v2.CenterCrop(self.size)]
        values = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        transformed: Tensor = v2.Compose([*shape, *values])(image)
        return transformed
