"""A run in memory for a custom training loop: in a test, a notebook, or another trainer."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import get_args

import torch
from torch import Tensor

from exitkit.data.base import Batch
from exitkit.engine.devices import Layout
from exitkit.engine.engine import Engine
from exitkit.engine.precision import Precision
from exitkit.engine.randomness import derive
from exitkit.errors import Note, UserError, unknown
from exitkit.escaping import counted
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.ownership import frozen
from exitkit.runs.job import make_phases
from exitkit.strategy.base import Phase, TrainingStrategy
from exitkit.strategy.batch import LocalBatch
from exitkit.strategy.composition import Composition, build_strategy, trains_whole_epochs
from exitkit.strategy.position import Position
from exitkit.strategy.run import Run
from exitkit.training.local_checks import (
    as_sequence,
    check_batch,
    check_network,
    check_optimizer,
    check_pair,
    errors_explained,
    set_mode,
)
from exitkit.training.phase import check_trains, trains

_ENOUGH_EPOCHS = 100  # to ask a strategy for its phases; a custom loop may have fewer epochs than there are phases


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
        phase: Phase,
        added: Collection[str],
        label: str,
    ) -> None:
        super().__init__(network, strategy, optimizer, engine, seed, position)
        self._method, self._phase, self._added, self._label = strategy, phase, added, label

    def train_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Make one step of the strategy on images [B, *input_shape] and labels [B]; it does not move the schedule.

        The network must be in training mode; stages and heads that the method does not train, and batch norm of frozen
        parts, are put into evaluation mode.

        Raises:
            UserError: the network is in evaluation mode, the batch is not such a pair (see `check_batch`), or the
                method trains whole epochs.
        """
        if trains_whole_epochs(self._method):
            raise UserError(
                f"{self._label} trains whole epochs; use run.train_epoch(batches) in place of run.train_step"
            )
        set_mode(self.network, self._phase, self._added)
        self.batch = self.placed(batch)
        with errors_explained(self):
            self._method.train_step(self, self.batch)
        self.position.single += 1

    def losses(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """See `Run.losses`; in a loop of one's own, the batch may be a mistake."""
        check_pair(batch)
        return super().losses(batch, parameters)

    def placed(self, batch: tuple[Tensor, Tensor]) -> LocalBatch:
        """Return a batch in the memory layout of the network, after checking it."""
        images, labels = check_batch(batch, self.network)
        placement = self._engine.placement
        return LocalBatch.make(placement.images(images) if placement.channels_last else images, labels)

    def train_epoch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Train for one epoch in training mode, and move to the next; the learning rate is the optimiser's own.

        A network in evaluation mode is put into training mode; of one in training mode, single modules may be in
        evaluation mode. What the method does not train is put into evaluation mode as by `train_step`.

        Args:
            batches: pairs (images, labels), see `train_step`: a list, a `DataLoader`, or any other iterable; one
                without a length, such as a generator, is read into a list first.

        Raises:
            UserError: there are no batches, a batch is wrong, or more epochs than the run was made for.
        """
        batches = as_sequence(batches)
        if not len(batches):
            raise UserError("the epoch has no batches; expected at least one")
        if self.position.epoch >= self.position.epochs:
            made_for = f"the run was made for {counted(self.position.epochs, 'epoch')}"
            raise UserError(f"{made_for}; give their number by Run.local(epochs=...)")
        if not self.network.training:
            self.network.train()
        set_mode(self.network, self._phase, self._added)
        with errors_explained(self):
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
    layout: Layout = "auto",
) -> LocalRun:
    """Make a run in memory, in one process, on the network's device (`exitkit.Run.local`).

    Adapts the network, adds its new parameters to the optimiser, and prepares the strategy. Then
    `run.train_step((images, labels))` makes a step, and `run.train_epoch(batches)` an epoch over a list of such pairs.
    The preparation does not change the caller's random state.

    Of a method with one phase, the parameters that the phase does not train are frozen, as `exitkit.train` does it:
    `heads` trains the heads on a fixed trunk. They stay frozen: before another run of the same network, thaw them by
    `network.requires_grad_(True)`. Methods with several phases are one phase here, which trains all parameters; if the
    phases have other strategies than the method itself (`imta`), a note says so. Temperatures are not fitted.

    Args:
        network: the network; it is adapted in place. Frozen parameters (`requires_grad=False`) stay as they are.
        strategy: a method, or the name of a method with its default settings.
        optimizer: optimiser of all parameters that are not frozen and that the method trains.
        seed: seed of all random numbers of the strategy.
        epochs: number of epochs, for values that follow the schedule.
        precision: see `Precision`.
        layout: memory layout, see `Engine`; network and images are converted to it.

    Raises:
        UserError: `epochs` is below 1, or `seed` below 0; the optimiser lacks parameters that are trained, or has those
            of another network; or the strategy can't train this network or use this optimiser.
    """
    for name, value, known in (("precision", precision, Precision), ("layout", layout, Layout)):
        if value not in get_args(known):
            raise unknown(name, str(value), get_args(known))
    if isinstance(epochs, bool) or not isinstance(epochs, Integral) or int(epochs) < 1:
        raise UserError(f"epochs is {epochs!r}; expected a whole number of at least 1")
    epochs = int(epochs)
    if isinstance(seed, bool) or not isinstance(seed, Integral) or int(seed) < 0:
        raise UserError(f"seed is {seed!r}; expected a whole number of at least 0")
    label = strategy if isinstance(strategy, str) else type(strategy).__name__
    if isinstance(strategy, str):
        strategy = build_strategy(strategy)
    if not isinstance(strategy, TrainingStrategy):
        raise UserError(f"strategy is {strategy!r}; expected the name of a method, or what build_strategy returns")
    check_network(network)
    phase = _phase(strategy, label, epochs, network.num_exits)
    strategy = phase.strategy
    check_optimizer(optimizer, network, phase)
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    before = {name for name, _ in network.named_parameters()}
    modules = {name for name, _ in network.named_modules()}
    fixed = frozen(network)
    engine = Engine(next(network.parameters()).device, precision, layout=layout)
    with engine.placement.forked_randomness():
        engine.placement.seed(derive(seed, "adapt", 0))
        strategy.adapt(network)
    engine.place(network)
    check_trains(phase, label, network, before, fixed)
    for name, parameter in network.named_parameters():
        if not trains(phase, name, new=name not in before):
            parameter.requires_grad_(False)
    new = [p for name, p in network.named_parameters() if name not in before and id(p) not in optimized]
    if new:
        optimizer.add_param_group({"params": new})
    added = {name for name, _ in network.named_modules()} - modules
    run = LocalRun(network, strategy, optimizer, engine, seed, Position(epochs=epochs), phase, added, label)
    with engine.placement.forked_randomness():
        engine.placement.seed(derive(seed, "prepare", 0))
        strategy.prepare(run)
    return run


def _phase(strategy: TrainingStrategy, label: str, epochs: int, exits: int) -> Phase:
    """Return the only phase of a strategy, or a phase that trains all parameters in place of several."""
    phases = make_phases(strategy, max(epochs, _ENOUGH_EPOCHS), exits)
    if len(phases) == 1:
        return replace(phases[0], epochs=epochs)
    if all(_parts(phase.strategy) != _parts(strategy) for phase in phases):
        names = ", ".join(phase.name for phase in phases)
        warnings.warn(
            Note(
                f"{label} has phases with strategies of their own ({names}), and a custom loop is one phase of joint "
                "training; to train one phase, pass strategy.phases(epochs, exits)[i].strategy"
            ),
            stacklevel=3,
        )
    return Phase("train", strategy, epochs)


def _parts(strategy: TrainingStrategy) -> set[int]:
    parts = strategy.parts.values() if isinstance(strategy, Composition) else [strategy]
    return {id(part) for part in parts}


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
            run.batch = run.placed(batch)
            yield run.batch
        run.batch = None
        at.passes += at.abreast
