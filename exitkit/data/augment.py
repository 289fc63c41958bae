"""The papers' augmentation of small images, applied per batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crops_and_flips(images: Tensor, padding: int, offsets: Tensor, flips: Tensor) -> Tensor:
    """Pad with zeros, crop to the original size, flip left to right.

    Args:
        images: [B, C, H, W], on any device; `offsets` and `flips` are on the same device.
        padding: zeros added on every side, in pixels.
        offsets: integers [B, 2], row and column of each crop's corner in the padded image, 0 .. 2 * padding.
        flips: booleans [B], whether each crop is flipped.

    Returns:
        Images [B, C, H, W].
    """
    _, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    columns = offsets[:, 1:] + torch.where(flips[:, None], across.flip(0), across)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    # Indexing moves the channels to the end: [B, H, W, C].
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
