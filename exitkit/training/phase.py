"""The beginning of a phase: adaptation of the network, its optimiser, and preparation of the strategy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from exitkit.engine.engine import Engine
from exitkit.engine.randomness import derive
from exitkit.errors import UserError
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.compilation import compile_parts
from exitkit.networks.ownership import frozen, frozen_batchnorms
from exitkit.runs.job import Job
from exitkit.strategy.base import Phase
from exitkit.strategy.position import Position
from exitkit.strategy.run import Run, no_auxiliary
from exitkit.training.finetuning import WeightAverage, make_optimizer
from exitkit.training.observers import checked_tables


@dataclass
class PhaseSetup:
    """Set-up that all phases of a job share.

    Attributes:
        job: the job.
        engine: this process's engine.
        teachers: the teachers' networks by name.
        load_auxiliary: loads a side network of another run.
        frozen: names of the parameters that the network itself holds frozen; no phase trains them.
    """

    job: Job
    engine: Engine
    teachers: Mapping[str, MultiExitNetwork] = field(default_factory=dict)
    load_auxiliary: Callable[[str, str], Mapping[str, Tensor]] = no_auxiliary
    frozen: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.frozen = frozen(self.job.network)

    def begin(self, number: int) -> BegunPhase:
        """Adapt the network for a phase, make its optimiser, and prepare its strategy.

        Args:
            number: index of the phase; the phases before it must have begun.

        Raises:
            UserError: the phase has no parameter to train, or its strategy can't train this network.
        """
        job, network, phase = self.job, self.job.network, self.job.phases[number]
        recipe = job.recipe
        self.engine.placement.seed(derive(recipe.seed, "adapt", number))
        parameters = {name for name, _ in network.named_parameters()}
        modules = {name for name, _ in network.named_modules()}
        phase.strategy.adapt(network)
        added = {name for name, _ in network.named_modules()} - modules
        self.engine.place(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name not in self.frozen and trains(phase, name, new=name not in parameters))
        check_trains(phase, recipe.method, network, parameters, self.frozen)
        optimizer = make_optimizer(recipe, phase, network)
        position = Position(phase=number, epochs=phase.epochs)
        run = Run(network, phase.strategy, optimizer, self.engine, recipe.seed, position, self.load_auxiliary)
        run.teachers = self.teachers
        average = WeightAverage(run, recipe.weight_ema) if recipe.weight_ema else None
        if recipe.compile:
            compile_parts(network)
        self.engine.placement.seed(derive(recipe.seed, "prepare", number))
        phase.strategy.prepare(run)
        _check_tables(run, phase)
        return BegunPhase(phase, run, added, self.frozen, average)


@dataclass(frozen=True)
class BegunPhase:
    """A phase that has begun.

    Attributes:
        phase: the phase.
        run: the run that its strategy trains.
        added: names of the modules that its `adapt` has added to the network.
        frozen: names of the parameters that the network itself holds frozen.
        average: the average of the network's weights, if the recipe asks for it.
    """

    phase: Phase
    run: Run
    added: set[str]
    frozen: frozenset[str] = frozenset()
    average: WeightAverage | None = None

    @property
    def evaluated(self) -> MultiExitNetwork:
        """The network that is evaluated: with the averaged weights, if there is an average."""
        return self.average.network if self.average else self.run.network

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the phase needs to resume bit for bit."""
        return self.run.state_dict() | ({"average": self.average.state_dict()} if self.average else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        self.run.load_state_dict(state)
        if self.average:
            self.average.load_state_dict(state["average"])

    def train_mode(self) -> None:
        """Put the network into training mode; frozen stages, heads and batch norm stay in evaluation mode.

        Modules that the phase has added, or that it trains by their prefix, are not frozen.
        """
        self.run.network.train()
        hold_fixed(self.run.network, self.phase, self.added, self.frozen)


def hold_fixed(network: MultiExitNetwork, phase: Phase, added: Collection[str], fixed: Collection[str]) -> None:
    """Put what a phase does not train into evaluation mode: a frozen trunk, frozen stages and heads, and batch norm.

    Args:
        network: the network, in training mode.
        phase: the phase.
        added: names of the modules that the phase's `adapt` has added.
        fixed: names of the frozen parameters whose batch norm stays fixed in every phase.
    """
    if phase.trunk is not None:
        network.stages.eval()
    trained = phase.train if isinstance(phase.train, tuple) else ()
    if phase.batchnorm == "frozen":
        parts = {f"{kind}.{k}.": part for kind in ("stages", "heads") for k, part in enumerate(getattr(network, kind))}
        for prefix, part in parts.items():
            parameters = list(part.parameters())
            if parameters and not prefix.startswith(trained) and not any(p.requires_grad for p in parameters):
                part.eval()
        for name, module in network.named_modules():
            if isinstance(module, _BatchNorm) and name not in added and not f"{name}.".startswith(trained):
                module.eval()
    for layer in frozen_batchnorms(network, fixed) if fixed else ():
        layer.eval()


def check_trains(
    phase: Phase, method: str, network: MultiExitNetwork, before: set[str], fixed: Collection[str]
) -> None:
    """Check that a phase has parameters to train.

    Args:
        phase: the phase, whose `adapt` has been applied.
        method: its method's name, for the message.
        network: the adapted network.
        before: names of the parameters before it was adapted.
        fixed: names of the parameters that the network holds frozen.

    Raises:
        UserError: it has none.
    """
    names = {name for name, _ in network.named_parameters()}.difference(fixed)
    if not any(trains(phase, name, new=name not in before) for name in names):
        raise UserError(f"phase {phase.name} of method {method} has no parameter to train")
    if phase.trunk and any(trains(phase, name, new=False) for name in before & names if name.startswith("stages.")):
        raise UserError(f"phase {phase.name} of method {method} trains stages, and its trunk is frozen; change one")


def trains(phase: Phase, name: str, *, new: bool) -> bool:
    """Whether a phase trains the parameter called `name`, which its `adapt` has added (`new`) or not."""
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
