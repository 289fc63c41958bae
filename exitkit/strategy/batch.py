"""A rank's part of a global batch, and what it counts in the mean over all ranks."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from exitkit.data.base import Batch


class LocalBatch(Batch):
    """Images [B, C, H, W] and labels [B] of this rank, out of a global batch of `total` images.

    It unpacks like a `Batch`: `images, labels = batch`.

    Attributes:
        start: position of its first image in the global batch.
        total: images in the global batch.
        rank_weight: B * world / total: what a mean over these images counts in the mean over the ranks; 1 wherever the
            ranks have equally many images.
    """

    start: int
    total: int
    rank_weight: float

    @classmethod
    def make(cls, images: Tensor, labels: Tensor, start: int = 0, total: int | None = None, world: int = 1) -> Self:
        """Make one; by default it is the whole global batch."""
        batch = cls(images, labels)
        batch.start, batch.total = start, len(labels) if total is None else total
        batch.rank_weight = len(labels) * world / batch.total if batch.total else 1.0
        return batch

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Return `batch` itself if it is a local batch, else as the whole global batch."""
        return batch if isinstance(batch, cls) else cls.make(*batch)

    def halves(self, world: int) -> tuple[LocalBatch, LocalBatch]:
        """Return this rank's even and odd images, by their position in the global batch; a half may be empty."""
        odd = (torch.arange(len(self.labels)) + self.start) % 2
        sizes = ((self.total + 1) // 2, self.total // 2)
        even_rows, odd_rows = ((odd == parity).nonzero().squeeze(1).to(self.labels.device) for parity in (0, 1))
        even, rest = (
            LocalBatch.make(self.images[rows], self.labels[rows], (self.start + 1 - parity) // 2, size, world)
            for parity, rows, size in zip((0, 1), (even_rows, odd_rows), sizes, strict=True)
        )
        return even, rest
