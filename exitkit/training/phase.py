"""The beginning of a phase: adaptation of the network, its optimiser, and preparation of the strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from exitkit.engine.engine import Engine
from exitkit.engine.randomness import derive
from exitkit.errors import UserError
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.compilation import compile_parts
from exitkit.runs.job import Job
from exitkit.strategy.base import Phase
from exitkit.strategy.position import Position
from exitkit.strategy.run import Run, no_auxiliary
from exitkit.training.observers import checked_tables


@dataclass
class PhaseSetup:
    """Set-up that all phases of a job share.

    Attributes:
        job: the job.
        engine: this process's engine.
        teachers: the teachers' networks by name.
        load_auxiliary: loads a side network of another run.
    """

    job: Job
    engine: Engine
    teachers: Mapping[str, MultiExitNetwork] = field(default_factory=dict)
    load_auxiliary: Callable[[str, str], Mapping[str, Tensor]] = no_auxiliary

    def begin(self, number: int) -> BegunPhase:
        """Adapt the network for a phase, make its optimiser, and prepare its strategy.

        Args:
            number: index of the phase; the phases before it must have begun.

        Raises:
            UserError: the phase has no parameter to train, or its strategy can't train this network.
        """
        job, network, phase = self.job, self.job.network, self.job.phases[number]
        recipe = job.recipe
        torch.manual_seed(derive(recipe.seed, "adapt", number))
        parameters = {name for name, _ in network.named_parameters()}
        modules = {name for name, _ in network.named_modules()}
        phase.strategy.adapt(network)
        added = {name for name, _ in network.named_modules()} - modules
        self.engine.place(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(_trains(phase, name, new=name not in parameters))
        check_trains(phase, recipe.method, network, parameters)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        lr = recipe.lr if phase.lr is None else phase.lr
        if phase.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(trained, lr, weight_decay=recipe.weight_decay)
        else:
            optimizer = torch.optim.SGD(trained, lr, recipe.momentum, weight_decay=recipe.weight_decay)
        if recipe.compile:
            compile_parts(network)
        position = Position(phase=number, epochs=phase.epochs)
        run = Run(network, phase.strategy, optimizer, self.engine, recipe.seed, position, self.load_auxiliary)
        run.teachers = self.teachers
        torch.manual_seed(derive(recipe.seed, "prepare", number))
        phase.strategy.prepare(run)
        _check_tables(run, phase)
        return BegunPhase(phase, run, added)


@dataclass(frozen=True)
class BegunPhase:
    """A phase that has begun.

    Attributes:
        phase: the phase.
        run: the run that its strategy trains.
        added: names of the modules that its `adapt` has added to the network.
    """

    phase: Phase
    run: Run
    added: set[str]

    def train_mode(self) -> None:
        """Put the network into training mode; frozen batch norm stays in evaluation mode.

        Modules that the phase has added, or that it trains by their prefix, are not frozen.
        """
        network: nn.Module = self.run.network
        network.train()
        trained = self.phase.train if isinstance(self.phase.train, tuple) else ()
        if self.phase.batchnorm == "frozen":
            for name, module in network.named_modules():
                if isinstance(module, _BatchNorm) and name not in self.added and not f"{name}.".startswith(trained):
                    module.eval()


def check_trains(phase: Phase, method: str, network: MultiExitNetwork, before: set[str]) -> None:
    """Check that a phase has parameters to train.

    Args:
        phase: the phase, whose `adapt` has been applied.
        method: its method's name, for the message.
        network: the adapted network.
        before: names of the parameters before it was adapted.

    Raises:
        UserError: it has none.
    """
    if not any(_trains(phase, name, new=name not in before) for name, _ in network.named_parameters()):
        raise UserError(f"phase {phase.name} of method {method} has no parameter to train")


def _trains(phase: Phase, name: str, *, new: bool) -> bool:
    if isinstance(phase.train, tuple):
        return name.startswith(phase.train)
    return {"all": True, "new": new, "heads": name.startswith(("heads.", "link."))}[phase.train]


def _check_tables(run: Run, phase: Phase) -> None:
    """Check the tables of the strategy's `learned` before training, so that an error does not appear after it only.

    Raises:
        UserError: the result is not a list of tables.
    """
    try:
        tables = phase.strategy.learned(run)
    except Exception:  # nothing is learned yet; an error at the end of the phase is reported then
        return
    checked_tables(phase.strategy, tables)
