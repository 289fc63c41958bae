"""Side networks: what a method trains besides the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from exitkit.engine import Engine


class Auxiliary:
    """A side network (or a few free parameters) with its own optimiser, averaged over the ranks like the network."""

    def __init__(self, engine: Engine, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._engine = engine
        self.module = module
        self.optimizer = optimizer

    def step(self, loss: Tensor) -> None:
        """Make one step of the side network's optimiser on the gradient of `loss`."""
        parameters = list(self.module.parameters())
        gradients = self._engine.gradients(loss, parameters)
        # In fp16 the network's loss scale may be too large for this loss: such a step is left out, as the network's is.
        if self._engine.precision == "fp16" and not all(g is None or g.isfinite().all() for g in gradients):
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the module's and the optimiser's state."""
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take both back."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
