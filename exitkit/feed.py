"""An epoch's batches: their order, their share for this rank, and where training stands while they pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exitkit.data.base import Batch
from exitkit.errors import UserError
from exitkit.randomness import derive, generator
from exitkit.schedule import learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from exitkit.data.base import Data
    from exitkit.engine import Engine
    from exitkit.recipe import Recipe
    from exitkit.run import Run

_REPORT_INTERVAL = 0.2  # seconds


@dataclass(frozen=True)
class Progress:
    """How far a run is, for whoever shows it.

    Attributes:
        phase: the phase's name.
        epoch: the epoch under way (or just done), from 1, of `epochs`.
        fraction: share of the whole run that is done, 0..1.
        rate: steps a second.
        losses: mean training loss of each exit in this pass.
        accuracies: training accuracy of each exit in this pass, 0..1.
        epoch_done: whether this is an epoch's end.
    """

    phase: str
    epoch: int
    epochs: int
    fraction: float
    rate: float
    losses: list[float]
    accuracies: list[float]
    epoch_done: bool = False


class EpochBatches:
    """The batches of one epoch; iterating again is another pass over the same batches in the same order.

    Every batch moves the run's position, sets the learning rate and seeds the process's randomness (dropout), all as
    functions of the position alone.

    Args:
        run: the phase that trains on them.
        data: where the images come from.
        recipe: the resolved recipe.
        engine: whose share of each batch this is.
        phase: the phase's name, for progress.
        done: share of the whole schedule that lies before this phase, and the share that the phase is.
        report: called with the progress, a few times a second.
    """

    def __init__(
        self,
        run: Run,
        data: Data,
        recipe: Recipe,
        engine: Engine,
        phase: str,
        done: tuple[float, float],
        report: Callable[[Progress], None],
    ) -> None:
        self._run, self._data, self._recipe, self._engine = run, data, recipe, engine
        self._phase, self._done, self._report = phase, done, report
        self._told = 0.0

    def __len__(self) -> int:
        return len(self._positions())

    def _positions(self) -> list[tuple[Tensor, float]]:
        """This rank's share of every batch of the epoch: positions within the training part, and `Engine.share`."""
        recipe, engine, at = self._recipe, self._engine, self._run.position
        assert recipe.batch_size is not None
        count = len(self._data.split.train)
        order = torch.randperm(count, generator=generator(recipe.seed, "order", at.phase, at.epoch))
        # A last batch of a single image has no batch statistics, and one of fewer than ranks leaves some without any.
        whole = [batch for batch in order.split(recipe.batch_size) if len(batch) >= max(2, engine.world)]
        shares = [batch.tensor_split(engine.world)[engine.rank] for batch in whole]
        return [(share, len(share) * engine.world / len(batch)) for share, batch in zip(shares, whole, strict=True)]

    def __iter__(self) -> Iterator[Batch]:
        run, recipe, at = self._run, self._recipe, self._run.position
        shares = self._positions()
        positions = [share for share, _ in shares]
        at.steps, at.abreast = len(shares), 1
        run.meter.reset()
        seed = derive(recipe.seed, "augment", at.phase, at.epoch)
        began = time.perf_counter()
        for step, batch in enumerate(self._data.batches("train", positions, augment=True, seed=seed)):
            at.step = step
            self._engine.share = shares[step][1]
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(recipe, at)
            torch.manual_seed(derive(recipe.seed, "noise", at.phase, at.epoch, step, self._engine.rank))
            yield Batch(self._engine.images(batch.images), self._engine.labels(batch.labels))
            self._tell(at.abreast * (step + 1) / (time.perf_counter() - began))
        at.passes += at.abreast

    def _tell(self, rate: float) -> None:
        now = time.perf_counter()
        if now - self._told < _REPORT_INTERVAL:
            return
        self._told = now
        at = self._run.position
        passes = self._run.strategy.passes(self._run.network.num_exits)
        within = min((at.passes + at.abreast * (at.step + 1) / at.steps) / passes, 1.0)
        self._report(self._progress(at.epoch + 1, at.epoch + within, rate, *self._run.meter.averages()))

    def end(self, epoch: int, seconds: float, losses: list[float], accuracies: list[float]) -> None:
        """Report that epoch `epoch` (from 1) is done, after `seconds`, with these losses and accuracies (0..1)."""
        passes = self._run.strategy.passes(self._run.network.num_exits)
        rate = passes * self._run.position.steps / seconds
        self._report(replace(self._progress(epoch, epoch, rate, losses, accuracies), epoch_done=True))

    def _progress(
        self, epoch: int, behind: float, rate: float, losses: list[float], accuracies: list[float]
    ) -> Progress:
        before, share = self._done
        epochs = self._run.position.epochs
        return Progress(self._phase, epoch, epochs, before + share * behind / epochs, rate, losses, accuracies)


def check_batches(recipe: Recipe, data: Data, world: int) -> None:
    """Refuse batches that the data or the ranks can't make.

    Raises:
        UserError: more images a batch than there are, or fewer than two a rank.
    """
    assert recipe.batch_size is not None
    count = len(data.split.train)
    if recipe.batch_size > count:
        raise UserError(
            f"batch_size is {recipe.batch_size}, larger than the {count} training images; expected at most {count}"
        )
    if recipe.batch_size < 2 * world:
        raise UserError(f"batch_size is {recipe.batch_size} for {world} ranks; expected at least {2 * world}")
