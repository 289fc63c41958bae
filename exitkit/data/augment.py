"""The papers' augmentation for small images, a batch at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crops_and_flips(images: Tensor, padding: int, offsets: Tensor, flips: Tensor) -> Tensor:
    """Pad with zeros, crop to the old size, flip left to right.

    Args:
        images: [B, C, H, W], on any device; the draws lie there, too.
        padding: zeros on every side.
        offsets: [B, 2], row and column of each crop's corner in the padded image, 0 .. 2 * padding.
        flips: [B], whether each crop is flipped.

    Returns:
        [B, C, H, W].
    """
    _, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    columns = offsets[:, 1:] + torch.where(flips[:, None], across.flip(0), across)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    # Indexing brings the channels to the end: [B, H, W, C].
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
