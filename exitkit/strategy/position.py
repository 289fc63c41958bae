"""Where in the schedule training is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Position:
    """A point of the schedule; all numbers count from 0.

    Attributes:
        phase, epoch, step: numbers of the phase, the epoch within it (of `epochs`) and the batch (of `steps`).
        passes: passes over the data that are done in this epoch.
        abreast: how many passes the one under way counts as (several: replicas that train side by side).
    """

    phase: int = 0
    epoch: int = 0
    passes: int = 0
    step: int = 0
    epochs: int = 1
    steps: int = 1
    abreast: int = 1

    @property
    def fraction(self) -> float:
        """The share of the phase that is done, 0..1, as the learning rate uses it: every pass starts from 0."""
        return (self.epoch + self.step / self.steps) / self.epochs

    def end_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.epoch, self.passes, self.step = self.epoch + 1, 0, 0
