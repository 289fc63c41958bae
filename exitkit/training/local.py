"""A run in memory for a custom training loop: in a test, a notebook, or another trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from exitkit.engine.engine import Engine
from exitkit.engine.precision import Precision
from exitkit.engine.randomness import derive
from exitkit.errors import UserError
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.strategy.base import TrainingStrategy
from exitkit.strategy.batch import LocalBatch
from exitkit.strategy.composition import build_strategy
from exitkit.strategy.position import Position
from exitkit.strategy.run import Run


class LocalRun(Run):
    """The run that `Run.local` returns: one phase, in one process, with batches from the caller."""

    def __init__(
        self,
        network: MultiExitNetwork,
        strategy: TrainingStrategy,
        optimizer: torch.optim.Optimizer,
        engine: Engine,
        seed: int,
        position: Position,
    ) -> None:
        super().__init__(network, strategy, optimizer, engine, seed, position)
        self._method = strategy

    def train_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Make one step of the strategy on images [B, C, H, W] and labels [B]; the position does not change."""
        self.batch = LocalBatch.make(*batch)
        self._method.train_step(self, self.batch)

    def train_epoch(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Train for one epoch, and move to the next; the learning rate is the optimiser's own.

        Raises:
            UserError: there are no batches, or more epochs than the run was made for.
        """
        if not len(batches):
            raise UserError("the epoch has no batches; expected at least one")
        if self.position.epoch >= self.position.epochs:
            made_for = f"the run was made for {self.position.epochs} epochs"
            raise UserError(f"{made_for}; give their number by Run.local(epochs=...)")
        self._method.train_epoch(self, _Passes(self, batches))
        self.position.end_epoch()


def local_run(
    network: MultiExitNetwork,
    strategy: TrainingStrategy | str,
    optimizer: torch.optim.Optimizer,
    *,
    seed: int = 0,
    epochs: int = 1,
    precision: Precision = "fp32",
) -> LocalRun:
    """Make a run in memory, in one process, on the network's device (`exitkit.Run.local`).

    Adapts the network, adds its new parameters to the optimiser, and prepares the strategy. Then
    `run.train_step((images, labels))` makes a step, and `run.train_epoch(batches)` an epoch over a list of such pairs.
    The preparation does not change the caller's random state.

    Args:
        network: the network; it is adapted in place.
        strategy: a method, or the name of a method with its default settings.
        optimizer: optimiser of the network's parameters.
        seed: seed of all random numbers of the strategy.
        epochs: number of epochs, for values that follow the schedule.
        precision: see `Precision`.

    Raises:
        UserError: `epochs` is below 1, or the strategy can't train this network.
    """
    if epochs < 1:
        raise UserError(f"epochs is {epochs}; expected at least 1")
    if isinstance(strategy, str):
        strategy = build_strategy(strategy)
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    before = {id(parameter) for parameter in network.parameters()}
    engine = Engine(next(network.parameters()).device, precision)
    strategy.adapt(network)
    added = [p for p in network.parameters() if id(p) not in before | optimized]
    if added:
        optimizer.add_param_group({"params": added})
    run = LocalRun(network, strategy, optimizer, engine, seed, Position(epochs=epochs))
    with engine.placement.forked_randomness():
        torch.manual_seed(derive(seed, "prepare", 0))
        strategy.prepare(run)
    return run


class _Passes:
    """The batches of an epoch; each iteration is one pass, and every batch updates the run's position."""

    def __init__(self, run: LocalRun, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._run, self._batches = run, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[LocalBatch]:
        run, at = self._run, self._run.position
        at.steps, at.abreast = len(self), 1
        run.meter.reset()
        for step, batch in enumerate(self._batches):
            at.step = step
            run.batch = LocalBatch.make(*batch)
            yield run.batch
        run.batch = None
        at.passes += at.abreast
