"""The batches of an epoch: their order, the learning rate, and each rank's part of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from exitkit.data.base import Data
from exitkit.engine.engine import Engine
from exitkit.engine.randomness import derive, generator
from exitkit.errors import UserError
from exitkit.runs.recipe import Recipe, ResolvedRecipe
from exitkit.strategy.base import FrozenTrunk, Phase
from exitkit.strategy.batch import LocalBatch
from exitkit.strategy.position import Position
from exitkit.strategy.run import Run
from exitkit.training.finetuning import make_mix
from exitkit.training.progress import Progress, Report

_REPORT_INTERVAL = 0.2  # seconds
_WARMUP_START = 0.01


def learning_rate(recipe: ResolvedRecipe, at: Position, start: float | None = None) -> float:
    """Return the learning rate: `cosine` falls with every step, `step` at the first epoch after each milestone.

    Before, it rises linearly from a hundredth of the initial rate for `warmup` epochs, after which `cosine` begins.

    Args:
        recipe: the recipe, with the schedule and the initial rate.
        at: the point of the schedule.
        start: initial rate of this phase, if it is not the recipe's.
    """
    rate = recipe.lr if start is None else start
    fraction = at.fraction
    if recipe.warmup:
        done = fraction * at.epochs
        if done < recipe.warmup:
            return rate * (_WARMUP_START + (1 - _WARMUP_START) * done / recipe.warmup)
        fraction = (done - recipe.warmup) / (at.epochs - recipe.warmup)
    if recipe.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * fraction))
    passed = sum(at.epoch / at.epochs >= milestone for milestone in recipe.milestones or ())
    return rate * recipe.decay**passed


def view_of(recipe: Recipe, at: Position, trunk: FrozenTrunk | None) -> tuple[bool, int]:
    """Return whether the training images of an epoch are augmented, and the seed of their augmentation."""
    if trunk is None or trunk.views is None:
        return True, derive(recipe.seed, "augment", at.phase, at.epoch)
    if trunk.views == 0:
        return False, 0
    return True, derive(recipe.seed, "augment", at.phase, at.epoch % trunk.views)


class EpochBatches:
    """The batches of one epoch; iterating again is another pass over the same batches in the same order.

    Every batch updates the run's position, sets the learning rate and seeds the process's random numbers (mixed images,
    dropout), all as functions of the position only. Each rank mixes its own images.

    Args:
        run: the run that trains on the batches.
        data: the images.
        recipe: the resolved recipe.
        engine: the engine of this rank, which gets its share of each batch.
        phase: the phase.
        done: the share of the whole schedule before this phase, and the share of this phase.
        report: called with the progress, a few times per second.
    """

    def __init__(
        self,
        run: Run,
        data: Data,
        recipe: ResolvedRecipe,
        engine: Engine,
        phase: Phase,
        done: tuple[float, float],
        report: Report,
    ) -> None:
        self._run, self._data, self._recipe, self._engine = run, data, recipe, engine
        self._phase, self._done, self._report = phase, done, report
        self._reported = 0.0
        self._mix = make_mix(recipe, run.network.num_classes)

    def __len__(self) -> int:
        return len(self._positions())

    def _positions(self) -> list[tuple[Tensor, int, int]]:
        """Return this rank's part of every batch: positions of images, start in the batch, and size of the batch."""
        recipe, ranks, at = self._recipe, self._engine.ranks, self._run.position
        count = len(self._data.split.train)
        order = torch.randperm(count, generator=generator(recipe.seed, "order", at.phase, at.epoch))
        # Dropped: a last batch of one image, which has no batch statistics, or with fewer images than ranks.
        kept = [batch for batch in order.split(recipe.batch_size) if len(batch) >= max(2, ranks.world)]
        parts = []
        for batch in kept:
            shares = batch.tensor_split(ranks.world)
            start = sum(len(share) for share in shares[: ranks.rank])
            parts.append((shares[ranks.rank], start, len(batch)))
        return parts

    def __iter__(self) -> Iterator[LocalBatch]:
        run, recipe, engine, at = self._run, self._recipe, self._engine, self._run.position
        parts = self._positions()
        at.steps, at.abreast = len(parts), 1
        run.meter.reset()
        augment, seed = view_of(recipe, at, self._phase.trunk)
        began = time.perf_counter()
        positions = [part[0] for part in parts]
        for step, batch in enumerate(self._data.batches("train", positions, augment=augment, seed=seed)):
            at.step = step
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(recipe, at, self._phase.lr) * group.get("lr_factor", 1.0)
            engine.placement.seed(derive(recipe.seed, "noise", at.phase, at.epoch, step, engine.ranks.rank))
            mixed = self._mix(*batch) if self._mix else batch
            images, labels = engine.placement.images(mixed[0]), engine.placement.labels(mixed[1])
            run.batch = LocalBatch.make(images, labels, *parts[step][1:], engine.ranks.world)
            yield run.batch
            self._report_progress(at.abreast * (step + 1) / (time.perf_counter() - began))
        run.batch = None
        at.passes += at.abreast

    def _report_progress(self, rate: float) -> None:
        now = time.perf_counter()
        if now - self._reported < _REPORT_INTERVAL:
            return
        self._reported = now
        at = self._run.position
        passes = self._phase.strategy.passes(self._run.network.num_exits)
        within = min((at.passes + at.abreast * (at.step + 1) / at.steps) / passes, 1.0)
        self._report(self._progress(at.epoch + 1, at.epoch + within, rate, *self._run.meter.averages()))

    def end(self, epoch: int, seconds: float, losses: list[float], accuracies: list[float]) -> Progress:
        """Return the progress at the end of epoch `epoch` (from 1).

        Args:
            epoch: number of the epoch.
            seconds: duration of the epoch.
            losses, accuracies: training loss and accuracy (0..1) of each exit.
        """
        passes = self._phase.strategy.passes(self._run.network.num_exits)
        rate = passes * self._run.position.steps / seconds
        return replace(self._progress(epoch, epoch, rate, losses, accuracies), epoch_done=True)

    def _progress(self, epoch: int, done: float, rate: float, losses: list[float], accuracies: list[float]) -> Progress:
        before, share = self._done
        epochs = self._run.position.epochs
        return Progress(self._phase.name, epoch, epochs, before + share * done / epochs, rate, losses, accuracies)


def check_batches(recipe: ResolvedRecipe, data: Data, world: int) -> None:
    """Check that the recipe's batch size suits the data and the ranks.

    Raises:
        UserError: a batch is larger than the training part, or has fewer than two images per rank.
    """
    count = len(data.split.train)
    if recipe.batch_size > count:
        raise UserError(
            f"batch_size is {recipe.batch_size}, larger than the {count} training images; expected at most {count}"
        )
    if recipe.batch_size < 2 * world:
        raise UserError(f"batch_size is {recipe.batch_size} for {world} ranks; expected at least {2 * world}")
