"""Mean loss and accuracy of every exit over one pass, and the check for losses that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exitkit.errors import NonFiniteError
from exitkit.strategy.position import Position

# Reading a value from a GPU waits for it, so that losses on a GPU are checked once per this number of steps.
_GPU_INTERVAL = 20


class Meter:
    """Sums of every exit's losses and hits since the pass began, kept on the device."""

    def __init__(self, exits: int, position: Position) -> None:
        self._exits = exits
        self._position = position
        self._pending: list[tuple[int, Tensor]] = []
        self.reset()

    def reset(self) -> None:
        """Begin a pass, after checking the losses of the last one that are not checked yet."""
        self._check()
        self._sums: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def add(self, losses: Sequence[Tensor], logits: Sequence[Tensor], labels: Tensor) -> None:
        """Add one batch: K losses [B], K logits [B, C], labels [B].

        The label of a mixed image, whose labels are shares of the classes [B, C], is the class of the largest share.

        Raises:
            NonFiniteError: a loss is NaN or infinite (on a GPU within 20 steps).
        """
        labels = labels if labels.ndim == 1 else labels.argmax(1)
        exact = torch.float32 if labels.device.type == "mps" else torch.float64  # MPS has no float64
        hits = torch.stack([(output.argmax(1) == labels).sum() for output in logits]).to(exact)
        sums = torch.stack([torch.stack([loss.sum() for loss in losses]).to(exact), hits])
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += len(labels)
        self._pending.append((self._position.step, sums[0]))
        if sums.device.type == "cpu" or len(self._pending) >= _GPU_INTERVAL:
            self._check()

    def _check(self) -> None:
        if not self._pending:
            return
        finite = torch.stack([losses for _, losses in self._pending]).isfinite().cpu()
        for (step, _), row in zip(self._pending, finite, strict=True):
            if not row.all():
                exit_number = int((~row).nonzero()[0]) + 1
                at = self._position
                kept = " (the last good checkpoint is kept)" if at.epoch or at.phase else ""
                raise NonFiniteError(
                    f"the loss of exit {exit_number} is not finite in epoch {at.epoch + 1}, step {step + 1}"
                    f"; try a lower --lr{kept}"
                )
        self._pending = []

    def totals(self) -> Tensor:
        """Return sums [2, K] of losses and hits and the number of images, as one vector [2K + 1]."""
        self._check()
        sums = torch.zeros(2, self._exits, dtype=torch.float64) if self._sums is None else self._sums.cpu().double()
        return torch.cat([sums.flatten(), torch.tensor([float(self._count)], dtype=torch.float64)])

    def averages(self) -> tuple[list[float], list[float]]:
        """Return the mean loss and the accuracy (0..1) of every exit on this rank since the pass began."""
        return split_totals(self.totals())


def split_totals(totals: Tensor) -> tuple[list[float], list[float]]:
    """Return K mean losses and K accuracies (0..1) from the vector that `Meter.totals` returns."""
    count = max(float(totals[-1]), 1.0)
    losses, hits = (totals[:-1] / count).view(2, -1)
    return losses.tolist(), hits.tolist()
