"""Building blocks of MSDNet and RANet: convolution units, the stem's first layer, heads, initialisation."""

from __future__ import annotations

from typing import Literal

from torch import nn

from exitkit.networks.cascade import Head

Stem = Literal["small", "strided", "large"]
HeadForm = Literal["conv128", "conv", "pool"]
Init = Literal["released", "default", "he"]

STEM = "first layer: 3x3 convolution of stride 1 or 2, or 7x7 convolution of stride 2 and pooling (ImageNet)"
STEM_STRIDES = {"small": 1, "strided": 2, "large": 4}
"""The factor by which each first layer reduces the size of the image."""
HEAD = "two stride-2 convolutions of width 128 (CIFAR) or of the map's width (ImageNet), or pooling only"
INIT = "initialisation: that of the released code, PyTorch's default, or the He rule for every layer"


def conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution without bias, batch normalisation and ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def unit(inputs: int, outputs: int, stride: int, bottleneck: int | None) -> nn.Sequential:
    """Return a 1x1 convolution to at most `bottleneck` x outputs (none if None), followed by a 3x3 convolution."""
    if bottleneck is None:
        return conv_bn_relu(inputs, outputs, 3, stride)
    inner = min(inputs, bottleneck * outputs)
    return nn.Sequential(conv_bn_relu(inputs, inner, 1), conv_bn_relu(inner, outputs, 3, stride))


def first_layer(channels: int, width: int, stem: Stem) -> nn.Sequential:
    """Return the first layer: [B, channels, H, W] -> [B, width, H/s, W/s], where s is the stride of the stem."""
    if stem != "large":
        return conv_bn_relu(channels, width, 3, STEM_STRIDES[stem])
    conv = nn.Conv2d(channels, width, 7, 2, 3)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


def make_head(width: int, num_classes: int, form: HeadForm) -> Head:
    """Return a head for maps of `width` channels and any size.

    The released heads end in a fixed 2x2 pooling, which fits one image size; this head pools the whole map, which is
    the same at that size.
    """
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if form == "pool":
        return Head(nn.Sequential(*pool), nn.Linear(width, num_classes))
    inner = 128 if form == "conv128" else width
    convs = [conv_bn_relu(width, inner, 3, 2), conv_bn_relu(inner, inner, 3, 2)]
    return Head(nn.Sequential(*convs, *pool), nn.Linear(inner, num_classes), before_pooling=len(convs))


def he_init(module: nn.Module) -> None:
    """Initialise a convolution from N(0, 2 / (k*k*outputs)), and a linear layer's bias to 0; for `Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
