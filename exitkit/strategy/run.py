"""What a strategy is handed, and all that it may use: network, optimiser, gradients, ranks, position, randomness."""

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
from exitkit.networks.cascade import MultiExitNetwork, Outputs, map_tensors
from exitkit.networks.compilation import eagerly
from exitkit.strategy.auxiliary import Auxiliary
from exitkit.strategy.batch import LocalBatch
from exitkit.strategy.functional import PseudoStep, pseudo_step, tangents, untracked
from exitkit.strategy.meter import Meter
from exitkit.strategy.position import Position

PerExit = TypeVar("PerExit", bound=Sized)


class Objective(Protocol):
    """What a run asks of its strategy: losses and weights of the exits, and the state to save."""

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return K losses [B]."""

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Return K weights."""

    def observe(self, run: Run, losses: Sequence[Tensor], batch: Batch) -> None:
        """See the losses of a forward pass."""

    def sample_weights(self, run: Run, losses: Sequence[Tensor], outputs: Outputs) -> Tensor | None:
        """Return the weights of the images [B, K], or None where all are 1; for diagnostics."""

    def state_dict(self) -> dict[str, Any]:
        """Return what has to be saved to resume."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""


def no_auxiliary(source: str, name: str) -> Mapping[str, Tensor]:
    """Refuse to load a side network from another run: this run was not set up to."""
    raise UserError(f"side network {name} of {source} can't be loaded here; expected a run that `exitkit train` made")


class Run:
    """One phase of training, as a strategy sees it.

    Every mean over data that a method computes is over the local batch; the run weighs and averages it over the ranks.

    Attributes:
        network: the network, adapted.
        strategy: the strategy of the phase, or the composition; use `losses` and `weights` rather than its hooks.
        optimizer: the network's optimiser.
        position: the point of the schedule; see `Position`.
        batch: the batch of the current step, which the loop sets; its rank weight applies where none is given.
        teachers: the trained networks of other runs that the strategy learns from, by name.
        auxiliaries: the side networks that `auxiliary` has made, by name.
    """

    local: ClassVar[Callable[..., Any]]
    """Make a run in memory, for a loop of one's own; see `exitkit.training.local.local_run`."""

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

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The network's parameters that the optimiser moves, in its order."""
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
        """Return the outputs of a teacher, one of the strategy's `teachers()`, for images [B, C, H, W]."""
        with self._engine.arithmetic.autocast():
            outputs: Outputs = self.teachers[name](images)
        return outputs

    def functional(
        self, parameters: Mapping[str, Tensor], images: Tensor, *, batchnorm: Literal["moving", "kept"] = "moving"
    ) -> Outputs:
        """Run the network with some of its parameters (by name) replaced.

        Args:
            parameters: the replacements; gradients reach them.
            images: [B, C, H, W].
            batchnorm: whether running statistics follow the batch (`moving`) or stay (`kept`); in training mode the
                batch's own statistics normalise in both cases.
        """
        with self._engine.arithmetic.autocast(), untracked(self.network, batchnorm == "kept"), eagerly():
            outputs: Outputs = torch.func.functional_call(self.network, dict(parameters), (images,))
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
        """Return what `losses` returns, and the network's outputs."""
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

    def loss_tangents(self, batch: Batch, direction: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the directional derivatives of the K losses [B] as the parameters (by name) move in a direction.

        One forward pass in forward mode, in the parameters' own precision (not all of autocast's casts have a forward
        mode); the running statistics of batch norm stay.
        """

        def losses(parameters: Mapping[str, Tensor]) -> list[Tensor]:
            with untracked(self.network), eagerly():
                outputs = torch.func.functional_call(self.network, dict(parameters), (batch[0],))
            return self.objective(outputs, batch)

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
            batch: the batch that it is a mean over; by default that of the current step.
            optimizer: by default the network's.
        """
        optimizer = optimizer or self.optimizer
        self._engine.backward(loss, parameters_of(optimizer), self._rank_weight(batch))
        self._engine.arithmetic.step(optimizer)

    def backward(self, loss: Tensor, batch: Batch | None = None) -> None:
        """Set each parameter's `grad` from `loss`, averaged over the ranks: `step` without the update."""
        self._engine.backward(loss, self.parameters, self._rank_weight(batch))

    def exit_gradients(self, losses: Sequence[Tensor], batch: Batch | None = None) -> list[list[Tensor | None]]:
        """Return the gradient of each exit's mean loss, averaged over the ranks: K lists in the order of `parameters`.

        None where an exit does not read a parameter. A plain loop: exit k's backward pass covers the stages up to k.
        """
        return [self.gradients(loss.mean(), self.parameters, batch) for loss in losses]

    def gradients(self, loss: Tensor, tensors: Sequence[Tensor], batch: Batch | None = None) -> list[Tensor | None]:
        """Return the gradient of a mean over the local batch, averaged over the ranks; the graph is kept."""
        return self._engine.gradients(loss, tensors, self._rank_weight(batch))

    def apply(self, gradients: Iterable[Tensor | None]) -> None:
        """Make one step of the optimiser on given gradients, in the order of `parameters`; None leaves one alone."""
        self._engine.apply(self.optimizer, self.parameters, gradients)

    def pseudo_step(self, gradients: Sequence[Tensor | None]) -> PseudoStep:
        """Return where `apply(gradients)` would lead; nothing is changed.

        Raises:
            UserError: the optimiser is not SGD.
        """
        self.check_network_alone("a pseudo step")
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        return pseudo_step(self.optimizer, gradients, names)

    def halves(self, batch: Batch) -> tuple[LocalBatch, LocalBatch] | None:
        """Split the global batch into its even and its odd images, and return this rank's images of each.

        None for a global batch of fewer than four images: a half of one image has no batch statistics.
        """
        whole = LocalBatch.of(batch)
        return None if whole.total < 4 else whole.halves(self._engine.ranks.world)

    @contextmanager
    def seeded(self, tag: str, *, alike: bool = True) -> Iterator[None]:
        """Seed torch's own generators inside the block, as a function of the position and the tag alone.

        Args:
            tag: what is drawn; the same tag draws the same again.
            alike: whether all ranks draw the same (an update), or each its own (dropout).
        """
        rank = -1 if alike else self._engine.ranks.rank
        with self._engine.placement.forked_randomness():
            torch.manual_seed(derive(int(self.rng(tag).initial_seed()), rank))
            yield

    def auxiliary(
        self,
        name: str,
        module: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ) -> Auxiliary:
        """Register a side network, which is placed, averaged over the ranks and saved with the run.

        Args:
            name: the name to save it under.
            module: the side network.
            optimizer: makes its optimiser from its parameters. None: the network's optimiser trains it, as one more
                parameter group; its parameters come last in `parameters`.
        """
        self._engine.placement.network(module)
        parameters = list(module.parameters())
        if optimizer is None and parameters:
            self.optimizer.add_param_group({"params": parameters})
        separate = optimizer(parameters) if optimizer is not None else None
        self.auxiliaries[name] = Auxiliary(self, self._engine, module, separate)
        return self.auxiliaries[name]

    def check_network_alone(self, what: str) -> None:
        """Check that the network's optimiser trains the network alone.

        Raises:
            UserError: it also trains a side network, which `what` can't replace.
        """
        joined = [name for name, side in self.auxiliaries.items() if side.joined and list(side.module.parameters())]
        if joined:
            raise UserError(f"{what} can't be combined with side networks in the network's optimiser ({joined[0]})")

    def load_auxiliary(self, name: str, source: str) -> None:
        """Give a side network the weights that the one of that name had at the end of a finished run.

        Args:
            name: the side network.
            source: the run's folder, one of the strategy's `ingredients()`.

        Raises:
            UserError: there is none, or it is of another shape.
        """
        module, state = self.auxiliaries[name].module, self._load_auxiliary(source, name)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"the {name} network of {source} does not fit here ({reason})") from None

    def mean(self, tensor: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the mean over the global batch of a mean over the local batch."""
        return self._engine.mean(tensor, self._rank_weight(batch))

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the global batch of a tensor whose first dimension is the local batch."""
        return self._engine.ranks.gather(tensor)

    def local_rows(self, gathered: Tensor, local: Tensor) -> Tensor:
        """Return this rank's rows of what `gather(local)` returned."""
        return self._engine.ranks.local_rows(gathered, local)

    def rng(self, tag: str) -> torch.Generator:
        """Return a CPU generator for this point of the schedule, the same on all ranks."""
        at = self.position
        return generator(self._seed, tag, at.phase, at.epoch, at.passes, at.step)

    def checkpoint(self) -> None:
        """Save the run between two passes of an epoch; `state_dict` must tell the strategy where to resume.

        On resuming, `train_epoch` is called again for the same epoch, with the state loaded.
        """
        self.on_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the phase needs to resume with the same bits."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._engine.arithmetic.state_dict(),
            "strategy": self.strategy.state_dict(),
            "auxiliaries": {name: side.state_dict() for name, side in self.auxiliaries.items()},
            "position": [self.position.phase, self.position.epoch, self.position.passes],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it; the network must be adapted and the strategy prepared already."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._engine.arithmetic.load_state_dict(state["scaler"])
        device = self._engine.device  # optimisers and modules move what they load; a strategy's state is moved here
        self.strategy.load_state_dict(map_tensors(lambda tensor: tensor.to(device), state["strategy"]))
        for name, side in self.auxiliaries.items():
            side.load_state_dict(state["auxiliaries"][name])
        self.position.phase, self.position.epoch, self.position.passes = state["position"]

    def _rank_weight(self, batch: Batch | None) -> float:
        chosen = self.batch if batch is None else batch
        return chosen.rank_weight if isinstance(chosen, LocalBatch) else 1.0

    def exit_losses(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Old name of `losses`, which stays for this release."""
        warnings.warn("run.exit_losses is now run.losses", DeprecationWarning, stacklevel=2)
        return self.losses(batch, parameters)

    def exit_weights(self) -> Sequence[float]:
        """Old name of `weights`, which stays for this release."""
        warnings.warn("run.exit_weights is now run.weights", DeprecationWarning, stacklevel=2)
        return self.weights()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimiser moves, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def per_exit(strategy: Objective, hook: str, values: PerExit, exits: Sized) -> PerExit:
    """Return what a hook returned for the exits.

    Raises:
        UserError: the number of values is not the number of exits.
    """
    name = type(strategy).__name__
    if not isinstance(values, Sequence):
        raise UserError(
            f"{hook} of {name} returned a {type(values).__name__}; expected a list of {len(exits)}, one per exit"
        )
    if len(values) != len(exits):
        raise UserError(f"{hook} of {name} returned {len(values)} values; expected {len(exits)}, one per exit")
    return values
