"""Position in the schedule of training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Position:
    """A point of the schedule; indices start at 0.

    Attributes:
        phase, epoch, step: indices of the phase, the epoch within it (of `epochs`) and the batch (of `steps`).
        passes: number of finished passes over the data in this epoch.
        abreast: number of passes that the current pass counts as; above 1 for replicas that train side by side.
        single: number of steps outside of epochs, which a custom loop makes; they do not move the schedule.
    """

    phase: int = 0
    epoch: int = 0
    passes: int = 0
    step: int = 0
    epochs: int = 1
    steps: int = 1
    abreast: int = 1
    single: int = 0

    @property
    def fraction(self) -> float:
        """Share of the phase that is done, 0..1, for the learning rate; all passes of an epoch start alike."""
        return (self.epoch + self.step / self.steps) / self.epochs

    @property
    def batch(self) -> int:
        """Number of batches of this phase before the current one."""
        return self.epoch * self.steps + self.step + self.single

    def end_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.epoch, self.passes, self.step = self.epoch + 1, 0, 0
