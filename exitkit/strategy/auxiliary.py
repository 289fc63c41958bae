"""Side networks, which a method trains besides the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from exitkit.data.base import Batch
from exitkit.engine.engine import Engine


class Gradients(Protocol):
    """Interface of a run for its side networks; see `Run.gradients`."""

    def gradients(self, loss: Tensor, tensors: Sequence[Tensor], batch: Batch | None = None) -> list[Tensor | None]:
        """Return the gradients of a mean over the local batch, averaged over the ranks."""


class Auxiliary:
    """A side network (or a few free parameters); its gradients are averaged over the ranks, as the network's are.

    Attributes:
        module: the side network.
        joined: whether the network's optimiser trains it.
        optimizer: its own optimiser, if it has one.
    """

    def __init__(
        self, run: Gradients, engine: Engine, module: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> None:
        self._run, self._engine = run, engine
        self.module = module
        self.joined = optimizer is None
        self._optimizer = optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its own optimiser.

        Raises:
            TypeError: the network's optimiser trains it.
        """
        if self._optimizer is None:
            raise TypeError("this side network is trained by the network's optimiser; it has none of its own")
        return self._optimizer

    def step(self, loss: Tensor, batch: Batch | None = None) -> None:
        """Make one step of the side network's optimiser.

        Args:
            loss: a mean over the local batch.
            batch: the batch of this mean; by default that of the current step.
        """
        optimizer = self.optimizer
        parameters = list(self.module.parameters())
        gradients = self._run.gradients(loss, parameters, batch)
        # The network's loss scale may be too large for this loss; the step is then skipped, as for the network.
        if self._engine.arithmetic.may_overflow and not all(g is None or g.isfinite().all() for g in gradients):
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of module and optimiser."""
        optimizer = {} if self._optimizer is None else self._optimizer.state_dict()
        return {"module": self.module.state_dict(), "optimizer": optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore both states."""
        self.module.load_state_dict(state["module"])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
