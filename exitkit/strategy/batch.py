"""A rank's part of a global batch, and its weight in the mean over the ranks."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from exitkit.data.base import Batch
from exitkit.networks.cascade import map_tensors


class LocalBatch(Batch):
    """Images [B, C, H, W] and labels [B] of this rank, out of a global batch of `total` images.

    It unpacks like a `Batch`: `images, labels = batch`.

    Attributes:
        start: position of its first image in the global batch.
        total: images in the global batch.
        rank_weight: B * world / total, the weight of a mean over these images in the mean over the ranks; 1 if all
            ranks have equally many images.
    """

    start: int
    total: int
    rank_weight: float

    @classmethod
    def make(cls, images: Tensor, labels: Tensor, start: int = 0, total: int | None = None, world: int = 1) -> Self:
        """Make a local batch; by default it is the whole global batch."""
        batch = cls(images, labels)
        batch.start, batch.total = start, len(labels) if total is None else total
        batch.rank_weight = len(labels) * world / batch.total if batch.total else 1.0
        return batch

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Return `batch` if it is a local batch, else a local batch that is the whole global batch."""
        return batch if isinstance(batch, cls) else cls.make(*batch)

    def halves(self, world: int) -> tuple[LocalBatch, LocalBatch]:
        """Return this rank's images of even and of odd position in the global batch; a half may be empty."""
        odd = (torch.arange(len(self.labels)) + self.start) % 2
        sizes = ((self.total + 1) // 2, self.total // 2)
        even_rows, odd_rows = ((odd == parity).nonzero().squeeze(1).to(self.labels.device) for parity in (0, 1))
        even_half, odd_half = (
            LocalBatch.make(_rows(self.images, rows), self.labels[rows], (self.start + 1 - parity) // 2, size, world)
            for parity, rows, size in zip((0, 1), (even_rows, odd_rows), sizes, strict=True)
        )
        return even_half, odd_half


def _rows(images: Any, rows: Tensor) -> Any:
    """Return rows of images, or of the features that stand for them."""
    return map_tensors(lambda tensor: tensor[rows], images)
