"""What a strategy is handed, and all that it may touch: network, optimiser, gradients, ranks, position, randomness."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from exitkit.auxiliary import Auxiliary
from exitkit.compilation import eagerly
from exitkit.data.base import Batch
from exitkit.engine import Engine, Precision
from exitkit.errors import UserError
from exitkit.functional import PseudoStep, pseudo_step, tangents, untracked
from exitkit.meter import Meter
from exitkit.network import MultiExitNetwork, Outputs, map_tensors
from exitkit.randomness import derive, generator
from exitkit.replicas import Replicas
from exitkit.strategy import TrainingStrategy, one_each

if TYPE_CHECKING:
    from exitkit.local_run import LocalRun


@dataclass
class Position:
    """Where in the schedule training stands, all counted from 0.

    Attributes:
        phase, epoch, step: numbers of the phase, the epoch within it (of `epochs`) and the batch (of `steps`).
        passes: done in this epoch; `abreast` is how many the one under way stands for (several: replicas side by side).
    """

    phase: int = 0
    epoch: int = 0
    passes: int = 0
    step: int = 0
    epochs: int = 1
    steps: int = 1
    abreast: int = 1

    @property
    def fraction(self) -> float:
        """The share of the phase that lies behind, 0..1, as the learning rate sees it: every pass counts from 0."""
        return (self.epoch + self.step / self.steps) / self.epochs


class Part(NamedTuple):
    """A part of the global batch: this rank's images of it, and what their mean counts (`Engine.share`)."""

    batch: Batch
    share: float


class Run:
    """One phase of training, as a strategy sees it.

    Attributes:
        network: the network, adapted.
        strategy: who rules the phase (a composition, where there is one: ask it for losses and weights).
        optimizer: the network's optimiser.
        position: where in the schedule training stands.
        teachers: the trained networks of other runs that the strategy learns from, by the names it gives them.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        strategy: TrainingStrategy,
        optimizer: torch.optim.Optimizer,
        engine: Engine,
        seed: int = 0,
        position: Position | None = None,
    ) -> None:
        self.network = network
        self.strategy = strategy
        self.optimizer = optimizer
        self.position = position or Position()
        self.meter = Meter(network.num_exits, self.position)
        self.on_checkpoint: Callable[[], None] = lambda: None
        self.auxiliaries: dict[str, Auxiliary] = {}
        self.teachers: dict[str, MultiExitNetwork] = {}
        self._engine = engine
        self._seed = seed

    @staticmethod
    def local(
        network: MultiExitNetwork,
        strategy: TrainingStrategy | str,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int = 0,
        epochs: int = 1,
        precision: Precision = "fp32",
    ) -> LocalRun:
        """Make a run in memory, in one process, on the device where the network is: to train in a loop of one's own.

        Adapts the network, hands the optimiser the parameters that this added, and prepares the strategy (a name stands
        for that method with nothing set). Then
        `run.train_step((images, labels))` makes a step, and `run.train_epoch(batches)` an epoch over a list of such
        pairs; what follows the schedule goes by `epochs`, how many of these there will be.

        Raises:
            UserError: fewer than one epoch.
        """
        from exitkit.local_run import begin

        return begin(network, strategy, optimizer, seed, epochs, precision)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The network's parameters that the optimiser moves, in its order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def forward(self, images: Tensor) -> Outputs:
        """Run the network on images [B, C, H, W] in the run's precision."""
        with self._engine.autocast():
            outputs: Outputs = self.network(images)
        return outputs

    @torch.no_grad()
    def teacher(self, name: str, images: Tensor) -> Outputs:
        """Return what the network of another run, one of the strategy's `teachers()`, says of images [B, C, H, W]."""
        with self._engine.autocast():
            outputs: Outputs = self.teachers[name](images)
        return outputs

    def functional(
        self, parameters: Mapping[str, Tensor], images: Tensor, *, batchnorm: Literal["moving", "kept"] = "moving"
    ) -> Outputs:
        """Run the network with some of its parameters (by name) replaced.

        Args:
            parameters: the replaced ones; gradients reach them.
            images: [B, C, H, W].
            batchnorm: whether its running statistics follow the batch or are kept; either way the batch's own normalise
                where the network trains.
        """
        with self._engine.autocast(), untracked(self.network, batchnorm == "kept"), eagerly():
            outputs: Outputs = torch.func.functional_call(self.network, dict(parameters), (images,))
        return outputs

    def exit_losses(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Run the network on a batch, and return the strategy's K losses [B], logging them and the accuracies.

        Args:
            batch: images [B, C, H, W] and labels [B].
            parameters: run on these instead of the network's own, as `functional` does.
        """
        return self.losses_and_outputs(batch, parameters)[0]

    def losses_and_outputs(
        self, batch: Batch, parameters: Mapping[str, Tensor] | None = None
    ) -> tuple[list[Tensor], Outputs]:
        """Do what `exit_losses` does, and return what the network gave, too."""
        images, labels = batch
        outputs = self.forward(images) if parameters is None else self.functional(parameters, images)
        losses = one_each(self.strategy, "exit_losses", self.strategy.exit_losses(self, outputs, batch), outputs.logits)
        self.meter.add(losses, outputs.logits, labels)
        return losses, outputs

    def loss_tangents(self, batch: Batch, direction: Mapping[str, Tensor]) -> list[Tensor]:
        """Return how fast each image's K losses [B] change as the parameters (by name) move in a direction.

        One forward pass in forward mode, in the parameters' own precision (not all of autocast's casts have a forward
        mode); batch norm's running statistics are kept.
        """

        def losses(parameters: Mapping[str, Tensor]) -> list[Tensor]:
            with untracked(self.network), eagerly():
                outputs = torch.func.functional_call(self.network, dict(parameters), (batch[0],))
            return self.strategy.exit_losses(self, outputs, batch)

        return tangents(losses, {name: self.network.get_parameter(name) for name in direction}, direction)

    def exit_weights(self) -> Sequence[float]:
        """Return the strategy's weight of each exit, now."""
        return one_each(self.strategy, "exit_weights", self.strategy.exit_weights(self), self.network.heads)

    def step(self, loss: Tensor) -> None:
        """Make one step of the optimiser on the gradient of `loss` (a mean over the local batch)."""
        self.backward(loss)
        self._engine.update(self.optimizer)

    def backward(self, loss: Tensor) -> None:
        """Set each parameter's `grad` from `loss`, averaged over the ranks; `step` is this and the update."""
        self._engine.backward(loss, self.parameters)

    def exit_gradients(self, losses: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """Return the gradient of each exit's mean loss, averaged over the ranks: K lists in `parameters`' order.

        None where an exit does not read a parameter. A plain loop: exit k's backward walks only the stages below it.
        """
        return [self.gradients(loss.mean(), self.parameters) for loss in losses]

    def gradients(self, loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradient of a mean over the local batch, averaged over the ranks; the graph stays for more."""
        return self._engine.gradients(loss, tensors)

    def weighed(self, loss: Tensor) -> Tensor:
        """Return a mean over the local batch as this rank's share of the mean over the ranks."""
        return self._engine.weighed(loss)

    def averaged(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return gradients of a `weighed` loss, averaged over the ranks and cut off from what they were made from."""
        copies = [None if gradient is None else gradient.detach().clone() for gradient in gradients]
        self._engine.average(copies)
        return copies

    def apply(self, gradients: Iterable[Tensor | None]) -> None:
        """Make one step of the optimiser on given gradients, in `parameters`' order; None leaves one alone."""
        self._engine.apply(self.optimizer, self.parameters, gradients)

    def pseudo_step(self, gradients: Sequence[Tensor | None]) -> PseudoStep:
        """Return where `apply(gradients)` would lead, without going there."""
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        return pseudo_step(self.optimizer, gradients, names)

    def replicas(self, emphasis: Sequence[Sequence[float]]) -> Replicas:
        """Return copies of the network that train side by side: one a row of `emphasis`, its factor of each exit.

        Each makes the steps that the network would make in a pass of its own, from now on and without momentum; the
        pass that they share counts as one each. The network itself stays as it is.
        """
        return Replicas(self, self._engine, emphasis)

    def halves(self, batch: Batch) -> tuple[Part, Part] | None:
        """Cut the global batch into its even and its odd images: this rank's of each (see `on`), which may be none.

        None for a batch of fewer than four images: one alone has no batch statistics.
        """
        offset, count = self._engine.place_in_batch(len(batch[1]))
        world = self._engine.world
        if count < 4:
            return None
        odd = (torch.arange(len(batch[1])) + offset) % 2
        sizes = ((count + 1) // 2, count // 2)
        chosen = [(odd == parity).nonzero().squeeze(1).to(batch[1].device) for parity in (0, 1)]
        even, rest = (
            Part(Batch(batch[0][rows], batch[1][rows]), len(rows) * world / size)
            for rows, size in zip(chosen, sizes, strict=True)
        )
        return even, rest

    @contextmanager
    def on(self, part: Part) -> Iterator[Batch]:
        """Have all means be over this part of the global batch, and give this rank's images of it."""
        before, self._engine.share = self._engine.share, part.share
        try:
            yield part.batch
        finally:
            self._engine.share = before

    @contextmanager
    def seeded(self, tag: str, *, alike: bool = True) -> Iterator[None]:
        """Draw from torch's own generators as a function of this point of the schedule and the tag alone.

        Args:
            tag: what is drawn; the same tag draws the same once more.
            alike: whether all ranks draw alike (an update), or each for itself (dropout).
        """
        rank = -1 if alike else self._engine.rank
        with self._engine.forked_randomness():
            torch.manual_seed(derive(int(self.rng(tag).initial_seed()), rank))
            yield

    def auxiliary(
        self,
        name: str,
        module: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    ) -> Auxiliary:
        """Register a side network, which is then placed, averaged over ranks and saved with the run.

        Args:
            name: what to save it as.
            module: the side network.
            optimizer: makes its optimiser from its parameters.
        """
        module.to(self._engine.device)
        self.auxiliaries[name] = Auxiliary(self._engine, module, optimizer(module.parameters()))
        return self.auxiliaries[name]

    def load_auxiliary(self, name: str, folder: str) -> None:
        """Give a side network what the one of that name had learned at the end of a finished run."""
        from exitkit.ingredients import side_network

        module, state = self.auxiliaries[name].module, side_network(folder, name)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"the {name} network of {folder} does not fit here ({reason})") from None

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over the global batch of what is a mean over the local one."""
        return self._engine.mean(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the global batch of a tensor whose first dimension is the local one."""
        return self._engine.gather(tensor)

    def own(self, gathered: Tensor, count: int) -> Tensor:
        """Return this rank's `count` rows of what `gather` returned."""
        return self._engine.own(gathered, count)

    def rng(self, tag: str) -> torch.Generator:
        """Return a CPU generator for this point of the schedule, the same on all ranks."""
        at = self.position
        return generator(self._seed, tag, at.phase, at.epoch, at.passes, at.step)

    def checkpoint(self) -> None:
        """Save the run between two passes of an epoch; `state_dict` must tell the strategy where to go on.

        On resuming, `train_epoch` is called again for the same epoch, with the state loaded.
        """
        self.on_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the phase needs to go on with the same bits."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._engine.scaler.state_dict(),
            "strategy": self.strategy.state_dict(),
            "auxiliaries": {name: side.state_dict() for name, side in self.auxiliaries.items()},
            "position": [self.position.phase, self.position.epoch, self.position.passes],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back; the network must be adapted and the strategy prepared already."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._engine.scaler.load_state_dict(state["scaler"])
        device = self._engine.device  # optimisers and modules move what they load; a strategy's state is moved here
        self.strategy.load_state_dict(map_tensors(lambda tensor: tensor.to(device), state["strategy"]))
        for name, side in self.auxiliaries.items():
            side.load_state_dict(state["auxiliaries"][name])
        self.position.phase, self.position.epoch, self.position.passes = state["position"]
