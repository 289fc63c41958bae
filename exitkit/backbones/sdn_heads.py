"""The heads of shallow-deep networks: internal classifiers, and the plain last one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from exitkit.network import Head

Shape = tuple[int, ...]


class MixedPool(nn.Module):
    """alpha * maximum + (1 - alpha) * average over each kernel; alpha is learned and unbounded."""

    def __init__(self, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.kernel = kernel
        self.alpha = nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        """Pool x [B, C, H, W] to [B, C, H/kernel, W/kernel]."""
        # Over a single pixel both are that pixel: the weight decides nothing, and so nothing depends on it.
        alpha = self.alpha if max(self.kernel) > 1 else self.alpha.detach()
        return alpha * max_pool2d(x, self.kernel) + (1 - alpha) * avg_pool2d(x, self.kernel)


def internal_classifier(shape: Shape, num_classes: int) -> Head:
    """A head for maps of `shape` (channels, height, width)."""
    channels, height, width = shape
    pool: list[nn.Module] = []
    if min(height, width) >= 4:
        kernel = (height // 4, width // 4)
        height, width = height // kernel[0], width // kernel[1]
        pool = [MixedPool(kernel)]
    return Head(nn.Sequential(*pool, nn.Flatten()), nn.Linear(channels * height * width, num_classes))


def pooled_head(width: int, num_classes: int, *before: nn.Module) -> Head:
    """The last head: what stands before it, the average over the map, one linear layer."""
    return Head(nn.Sequential(*before, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(width, num_classes))
