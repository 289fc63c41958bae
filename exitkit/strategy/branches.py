"""Branches: the network is trained several times from the same start, each time for one pass over the data.

In every step of branch b = 0..R-1 the run's optimiser makes a step on

    L_b = sum_j a_bj w_j mean(loss_j)     a [R, K] the emphasis, w_j the strategy's exit weights, loss_j [B] the
                                          strategy's exit losses

and every branch starts with the parameters at the beginning of the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exitkit.data.base import Batch
from exitkit.strategy.base import weighted_sum
from exitkit.strategy.replicas import Replicas
from exitkit.strategy.run import Run


class Branches:
    """Trains branches one by one or side by side; after an interruption it resumes after the finished ones.

    Args:
        side_by_side: train all branches at once (`Replicas`), with R times the memory and the same results.
        clean: whether every branch also starts with the batch-norm statistics at the beginning of the epoch and without
            momentum; False: it starts with those of the branch before, which is not possible side by side.
    """

    def __init__(self, side_by_side: bool = False, clean: bool = True) -> None:
        self._side_by_side, self._clean = side_by_side, clean
        self._endpoints: list[dict[str, Tensor]] = []

    def rehearse(self, run: Run, emphasis: Sequence[Sequence[float]]) -> None:
        """Check that the branches can be trained, without changing anything.

        Raises:
            UserError: the network, the strategy or the optimiser does not support training side by side.
        """
        run.check_network_alone("training in branches")
        if self._side_by_side:
            Replicas(run, emphasis).rehearse()

    def train(self, run: Run, batches: Iterable[Batch], emphasis: Sequence[Sequence[float]]) -> list[dict[str, Tensor]]:
        """Train the branches that are not finished in this epoch; the parameters are restored afterwards.

        Args:
            run: the run; it is saved after every branch (side by side: after all).
            batches: the epoch's batches; each iteration is one pass.
            emphasis: a [R, K].

        Returns:
            the trainable parameters by name at the end of each branch.
        """
        run.check_network_alone("training in branches")
        remaining = emphasis[len(self._endpoints) :]
        if remaining and self._side_by_side:
            replicas = Replicas(run, remaining)
            for batch in batches:
                replicas.step(batch)
            names = _trainable(run)
            self._endpoints += [{name: state[name] for name in names} for state in replicas.states()]
            run.checkpoint()
            return self._endpoints
        start = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
        for factors in remaining:
            for batch in batches:
                losses = run.losses(batch)  # before the weights, which may depend on the losses of earlier steps
                weights = [a * w for a, w in zip(factors, run.weights(), strict=True)]
                run.step(weighted_sum(losses, weights))
            ends = {name: run.network.get_parameter(name).detach().clone() for name in _trainable(run)}
            self._endpoints.append(ends)
            self._restart(run, start)
            run.checkpoint()
        return self._endpoints

    def _restart(self, run: Run, start: Mapping[str, Tensor]) -> None:
        if self._clean:
            run.network.load_state_dict(start)
            run.optimizer.state.clear()
            return
        with torch.no_grad():
            for name, parameter in run.network.named_parameters():
                parameter.copy_(start[name])

    def end_epoch(self) -> None:
        """Discard the branches of this epoch."""
        self._endpoints = []

    def state_dict(self) -> dict[str, Any]:
        """Return the end points of the branches that are finished in this epoch."""
        return {"endpoints": self._endpoints}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore these end points, so that training resumes after them."""
        self._endpoints = list(state["endpoints"])


def _trainable(run: Run) -> list[str]:
    return [name for name, parameter in run.network.named_parameters() if parameter.requires_grad]
