"""A run in memory, driven by a loop of one's own: in a test, a notebook, or another trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from exitkit.data.base import Batch
from exitkit.run import Run


class LocalRun(Run):
    """What `Run.local` makes: a phase whose batches come from whoever has made it."""

    def train_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Make one step of the strategy on images [B, C, H, W] and labels [B]; where training stands does not move."""
        self.strategy.train_step(self, Batch(*batch))

    def train_epoch(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Train for one epoch, and move on to the next; the learning rate is the optimiser's own."""
        self.strategy.train_epoch(self, _Passes(self, batches))
        self.position.epoch, self.position.passes, self.position.step = self.position.epoch + 1, 0, 0


class _Passes:
    """The batches of an epoch, which a strategy may pass over several times; each moves the run's position."""

    def __init__(self, run: LocalRun, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._run, self._batches = run, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        at = self._run.position
        at.steps, at.abreast = len(self), 1
        self._run.meter.reset()
        for step, batch in enumerate(self._batches):
            at.step = step
            yield Batch(*batch)
        at.passes += at.abreast
