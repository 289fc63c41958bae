"""The run that a strategy trains: network, optimiser, gradients, ranks, position in the schedule, randomness."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from exitkit.data.base import Batch
from exitkit.engine.engine import Engine
from exitkit.engine.precision import Precision
from exitkit.engine.randomness import derive, generator
from exitkit.errors import UserError
from exitkit.escaping import counted
from exitkit.networks.cascade import MultiExitNetwork, Outputs, map_tensors
from exitkit.networks.compilation import eagerly
from exitkit.strategy.auxiliary import Auxiliary
from exitkit.strategy.batch import LocalBatch
from exitkit.strategy.functional import PseudoStep, call, pseudo_step, tangents, trained_in, untracked
from exitkit.strategy.meter import Meter
from exitkit.strategy.position import Position

PerExit = TypeVar("PerExit", bound=Sized)


class Objective(Protocol):
    """Interface of a strategy for its run: losses and weights of the exits, and the state to save."""

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return K losses [B]."""

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Return K weights."""

    def observe(self, run: Run, losses: Sequence[Tensor], batch: Batch) -> None:
        """Receive the losses of a forward pass."""

    def sample_weights(self, run: Run, losses: Sequence[Tensor], outputs: Outputs) -> Tensor | None:
        """Return the weights of the images [B, K], or None where all are 1; for diagnostics."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is needed to resume."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""


def no_auxiliary(source: str, name: str) -> Mapping[str, Tensor]:
    """Raise an error: side networks of other runs can't be loaded in this run."""
    raise UserError(f"side network {name} of {source} can't be loaded in this run; expected a run of `exitkit train`")


class Run:
    """One phase of training, as the strategy uses it.

    Means over data that a method computes are over the local batch; the run weights and averages them over the ranks.

    Attributes:
        network: the network, adapted.
        strategy: the strategy of the phase, or the composition; use `losses` and `weights` rather than its hooks.
        optimizer: the network's optimiser.
        position: the point of the schedule; see `Position`.
        batch: the batch of the current step, which the loop sets; its rank weight applies where none is given.
        teachers: the trained networks of other runs that the strategy uses, by name.
        auxiliaries: the side networks that `auxiliary` has registered, by name.
    """

    local: ClassVar[Callable[..., Any]]
    """Make a run in memory, for a custom training loop; see `exitkit.training.local.local_run`."""

    def __init__(
        self,
        network: MultiExitNetwork,
        strategy: Objective,
        optimizer: torch.optim.Optimizer,
        engine: Engine,
        seed: int = 0,
        position: Position | None = None,
        load_auxiliary: Callable[[str, str], Mapping[str, Tensor]] = no_auxiliary,
    ) -> None:
        self.network = network
        self.strategy = strategy
        self.optimizer = optimizer
        self.position = position or Position()
        self.batch: LocalBatch | None = None
        self.meter = Meter(network.num_exits, self.position)
        self.on_checkpoint: Callable[[], None] = lambda: None
        self.auxiliaries: dict[str, Auxiliary] = {}
        self.teachers: Mapping[str, MultiExitNetwork] = {}
        self._engine = engine
        self._seed = seed
        self._load_auxiliary = load_auxiliary
        self._alone: str | None = None  # what supports no side network in the network's optimiser

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the network's optimiser trains, in its order; frozen ones are left out."""
        return parameters_of(self.optimizer)

    @property
    def precision(self) -> Precision:
        """The precision of the run's arithmetic."""
        return self._engine.arithmetic.precision

    def forward(self, images: Tensor) -> Outputs:
        """Run the network on images [B, C, H, W] in the run's precision."""
        with self._engine.arithmetic.autocast():
            outputs: Outputs = self.network(images)
        return outputs

    @torch.no_grad()
    def teacher(self, name: str, images: Tensor) -> Outputs:
        """Return the outputs of a teacher, one of the strategy's `teacher_runs()`, for images [B, C, H, W].

        Raises:
            UserError: the run has no such teacher; a custom loop sets `run.teachers` itself.
        """
        if name not in self.teachers:
            raise UserError(
                f"the run has no teacher {name!r}; set run.teachers = {{{name!r}: network}} before training"
            )
        with self._engine.arithmetic.autocast():
            outputs: Outputs = self.teachers[name](images)
        return outputs

    def functional(
        self, parameters: Mapping[str, Tensor], images: Tensor, *, batchnorm: Literal["moving", "kept"] = "moving"
    ) -> Outputs:
        """Run the network with some of its parameters (by name) replaced.

        Args:
            parameters: the replacements, for which gradients can be computed.
            images: [B, C, H, W].
            batchnorm: whether running statistics are updated (`moving`) or not (`kept`); in training mode the batch
                statistics normalise in both cases.
        """
        with self._engine.arithmetic.autocast(), untracked(self.network, batchnorm == "kept"), eagerly():
            outputs: Outputs = call(self.network, parameters, images)
        return outputs

    def losses(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Run the network on a batch, and return the strategy's K losses [B]; losses and accuracies are recorded.

        Args:
            batch: images [B, C, H, W] and labels [B].
            parameters: replacements for some of the network's parameters, as in `functional`.

        Raises:
            UserError: the strategy returns another number of losses.
            NonFiniteError: a loss is NaN or infinite.
        """
        return self.losses_and_outputs(batch, parameters)[0]

    def losses_and_outputs(
        self, batch: Batch, parameters: Mapping[str, Tensor] | None = None
    ) -> tuple[list[Tensor], Outputs]:
        """Return the result of `losses`, and the network's outputs."""
        images, labels = batch
        outputs = self.forward(images) if parameters is None else self.functional(parameters, images)
        losses = self.objective(outputs, batch)
        self.meter.add(losses, outputs.logits, labels)
        self.strategy.observe(self, [loss.detach() for loss in losses], batch)
        return losses, outputs

    def objective(self, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return the strategy's K losses [B] for given outputs; nothing is recorded."""
        losses = self.strategy.exit_losses(self, outputs, batch)
        return per_exit(self.strategy, "exit_losses", losses, outputs.logits)

    def loss_tangents(
        self,
        batch: Batch,
        direction: Mapping[str, Tensor],
        terms: Callable[[Outputs], Sequence[Tensor]] | None = None,
    ) -> list[Tensor]:
        """Return the derivatives of the K losses [B] in a direction of the parameters (by name).

        Computed by one forward pass in forward mode, in the parameters' own precision (not all of autocast's casts
        support forward mode); the running statistics of batch norm are not updated.

        Args:
            batch: images [B, C, H, W] and labels [B].
            direction: {name: direction of the parameter}.
            terms: any list of losses, as a function of the network's outputs; by default the strategy's K losses.
        """

        def losses(parameters: Mapping[str, Tensor]) -> Sequence[Tensor]:
            with untracked(self.network), eagerly():
                outputs = call(self.network, parameters, batch[0])
            return self.objective(outputs, batch) if terms is None else terms(outputs)

        return tangents(losses, {name: self.network.get_parameter(name) for name in direction}, direction)

    def weights(self) -> Sequence[float]:
        """Return the strategy's weight of each exit at this point of the schedule: K numbers.

        Raises:
            UserError: the strategy returns another number of weights.
        """
        return per_exit(self.strategy, "exit_weights", self.strategy.exit_weights(self), self.network.heads)

    def step(self, loss: Tensor, batch: Batch | None = None, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make one step of an optimiser on the gradient of `loss`.

        Args:
            loss: a mean over the local batch.
            batch: the batch of this mean; by default that of the current step.
            optimizer: the optimiser; by default the network's.
        """
        optimizer = optimizer or self.optimizer
        self._engine.backward(loss, parameters_of(optimizer), self._rank_weight(batch))
        self._engine.arithmetic.step(optimizer)

    def backward(self, loss: Tensor, batch: Batch | None = None) -> None:
        """Set each parameter's `grad` from `loss`, averaged over the ranks: `step` without the update."""
        self._engine.backward(loss, self.parameters, self._rank_weight(batch))

    def exit_gradients(self, losses: Sequence[Tensor], batch: Batch | None = None) -> list[list[Tensor | None]]:
        """Return the gradient of each exit's mean loss, averaged over the ranks: K lists in the order of `parameters`.

        None if an exit does not depend on a parameter. The exits are differentiated in a loop; the backward pass of
        exit k covers the stages up to k.
        """
        return [self.gradients(loss.mean(), self.parameters, batch) for loss in losses]

    def gradients(self, loss: Tensor, tensors: Sequence[Tensor], batch: Batch | None = None) -> list[Tensor | None]:
        """Return the gradients of a mean over the local batch, averaged over the ranks; the graph is kept."""
        return self._engine.gradients(loss, tensors, self._rank_weight(batch))

    def apply(self, gradients: Iterable[Tensor | None]) -> None:
        """Make one step of the optimiser on gradients in the order of `parameters`; None: no update of that one."""
        self._engine.apply(self.optimizer, self.parameters, gradients)

    def pseudo_step(self, gradients: Sequence[Tensor | None]) -> PseudoStep:
        """Return the parameters that `apply(gradients)` would give, without changing anything.

        Raises:
            UserError: the optimiser is not SGD, or trains a side network.
        """
        self.check_network_alone("a pseudo step")
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        return pseudo_step(self.optimizer, gradients, names)

    def check_pseudo_steps(self) -> None:
        """Check, before training, that `pseudo_step` supports the optimiser.

        Raises:
            UserError: it does not.
        """
        self.pseudo_step([None] * len(self.parameters))

    def halves(self, batch: Batch) -> tuple[LocalBatch, LocalBatch] | None:
        """Split the global batch into its even and its odd images, and return this rank's images of each.

        Returns None for a global batch of fewer than four images: a half of one image has no batch statistics.
        """
        local = LocalBatch.of(batch)
        return None if local.total < 4 else local.halves(self._engine.ranks.world)

    @contextmanager
    def seeded(self, tag: str, *, alike: bool = True) -> Iterator[None]:
        """Seed torch's generators inside the block, as a function of the position and the tag only.

        Args:
            tag: purpose of the random numbers; the same tag gives the same numbers.
            alike: whether all ranks get the same numbers (an update), or each rank its own (dropout).
        """
        rank = -1 if alike else self._engine.ranks.rank
        with self._engine.placement.forked_randomness():
            self._engine.placement.seed(derive(int(self.rng(tag).initial_seed()), rank))
            yield

    def auxiliary(
        self,
        name: str,
        module: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ) -> Auxiliary:
        """Register a side network, which is placed, averaged over the ranks and saved with the run.

        Args:
            name: name under which it is saved.
            module: the side network.
            optimizer: makes its optimiser from its parameters. None: the network's optimiser trains it, in a further
                parameter group; its parameters are then the last ones in `parameters`.
        """
        self._engine.placement.network(module)
        parameters = list(module.parameters())
        if optimizer is None and parameters:
            self.optimizer.add_param_group({"params": parameters})
        separate = optimizer(parameters) if optimizer is not None else None
        self.auxiliaries[name] = Auxiliary(self, self._engine, module, separate)
        if self._alone is not None:
            self.check_network_alone(self._alone)
        return self.auxiliaries[name]

    def check_network_alone(self, what: str) -> None:
        """Check that the network's optimiser trains no side network, now and when later ones are registered.

        Args:
            what: the operation that does not support this, for the message.

        Raises:
            UserError: it trains a side network.
        """
        self._alone = what
        joined = [name for name, side in self.auxiliaries.items() if side.joined and list(side.module.parameters())]
        if joined:
            raise UserError(f"{what} can't be combined with side networks in the network's optimiser ({joined[0]})")

    def load_auxiliary(self, name: str, source: str) -> None:
        """Load the weights that the side network of the same name had at the end of a finished run.

        Args:
            name: the side network.
            source: the run's folder, one of the strategy's `ingredients()`.

        Raises:
            UserError: the run has no such side network, or one of another shape.
        """
        module, state = self.auxiliaries[name].module, self._load_auxiliary(source, name)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"the {name} network of {source} does not fit this run ({reason})") from None

    def mean(self, tensor: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the mean over the global batch, given a mean over the local batch."""
        return self._engine.mean(tensor, self._rank_weight(batch))

    def gather(self, tensor: Tensor) -> Tensor:
        """Return a tensor for the global batch, given the part whose first dimension is the local batch."""
        return self._engine.ranks.gather(tensor)

    def local_rows(self, gathered: Tensor, local: Tensor) -> Tensor:
        """Return this rank's rows of the result of `gather(local)`."""
        return self._engine.ranks.local_rows(gathered, local)

    def rng(self, tag: str) -> torch.Generator:
        """Return a CPU generator for this point of the schedule, the same on all ranks."""
        at = self.position
        return generator(self._seed, tag, at.phase, at.epoch, at.passes, at.step, *([at.single] if at.single else []))

    def checkpoint(self) -> None:
        """Save the run between two passes of an epoch; the strategy's `state_dict` must contain where to resume.

        On resuming, `train_epoch` is called again for the same epoch, after `load_state_dict`.
        """
        self.on_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the phase needs to resume bit for bit."""
        at = self.position
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._engine.arithmetic.state_dict(),
            "strategy": self.strategy.state_dict(),
            "auxiliaries": {name: side.state_dict() for name, side in self.auxiliaries.items()},
            "position": [at.phase, at.epoch, at.passes, at.single],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state; the network must be adapted, and the strategy prepared."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._engine.arithmetic.load_state_dict(state["scaler"])
        device = self._engine.device  # optimisers and modules move loaded tensors themselves
        self.strategy.load_state_dict(map_tensors(lambda tensor: tensor.to(device), state["strategy"]))
        for name, side in self.auxiliaries.items():
            side.load_state_dict(state["auxiliaries"][name])
        at = self.position
        at.phase, at.epoch, at.passes, *single = state["position"]  # checkpoints of earlier releases have three
        at.single = single[0] if single else 0

    def _rank_weight(self, batch: Batch | None) -> float:
        chosen = self.batch if batch is None else batch
        return chosen.rank_weight if isinstance(chosen, LocalBatch) else 1.0

    def exit_losses(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Deprecated name of `losses`."""
        warnings.warn("run.exit_losses is now run.losses", DeprecationWarning, stacklevel=2)
        return self.losses(batch, parameters)

    def exit_weights(self) -> Sequence[float]:
        """Deprecated name of `weights`."""
        warnings.warn("run.exit_weights is now run.weights", DeprecationWarning, stacklevel=2)
        return self.weights()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimiser trains, in its order; frozen ones are left out."""
    return [parameter for group in optimizer.param_groups for parameter in trained_in(group)]


def per_exit(strategy: Objective, hook: str, values: PerExit, exits: Sized) -> PerExit:
    """Return the values that a hook returned, one per exit.

    Raises:
        UserError: the number of values is not the number of exits.
    """
    name = type(strategy).__name__
    if not isinstance(values, Sequence):
        raise UserError(
            f"{hook} of {name} returned a {type(values).__name__}; expected a list of {len(exits)}, one per exit"
        )
    if len(values) != len(exits):
        raise UserError(
            f"{hook} of {name} returned {counted(len(values), 'value')}; expected {len(exits)}, one per exit"
        )
    return values
