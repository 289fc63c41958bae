"""A run in memory, driven by a loop of one's own: in a test, a notebook, or another trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from exitkit.build import build_strategy
from exitkit.data.base import Batch
from exitkit.engine import Engine, Precision
from exitkit.errors import UserError
from exitkit.network import MultiExitNetwork
from exitkit.randomness import derive
from exitkit.run import Position, Run
from exitkit.strategy import TrainingStrategy


class LocalRun(Run):
    """What `Run.local` makes: a phase whose batches come from whoever has made it."""

    def train_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Make one step of the strategy on images [B, C, H, W] and labels [B]; where training stands does not move."""
        self.strategy.train_step(self, Batch(*batch))

    def train_epoch(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Train for one epoch, and move on to the next; the learning rate is the optimiser's own.

        Raises:
            UserError: no batches, or more epochs than the run was made for.
        """
        if not len(batches):
            raise UserError("an epoch of no batches; expected at least one")
        if self.position.epoch >= self.position.epochs:
            made_for = f"the run was made for {self.position.epochs} epochs"
            raise UserError(f"{made_for}; say how many by Run.local(epochs=...)")
        self.strategy.train_epoch(self, _Passes(self, batches))
        self.position.epoch, self.position.passes, self.position.step = self.position.epoch + 1, 0, 0


def begin(
    network: MultiExitNetwork,
    strategy: TrainingStrategy | str,
    optimizer: torch.optim.Optimizer,
    seed: int,
    epochs: int,
    precision: Precision,
) -> LocalRun:
    """See `Run.local`."""
    if epochs < 1:
        raise UserError(f"epochs is {epochs}; expected at least 1")
    if isinstance(strategy, str):
        strategy = build_strategy(strategy)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    before = {id(parameter) for parameter in network.parameters()}
    strategy.adapt(network)
    added = [p for p in network.parameters() if id(p) not in before | held]
    if added:
        optimizer.add_param_group({"params": added})
    device = next(network.parameters()).device
    run = LocalRun(network, strategy, optimizer, Engine(device, precision), seed, Position(epochs=epochs))
    torch.manual_seed(derive(seed, "prepare", 0))
    strategy.prepare(run)
    return run


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
