"""Replicas: copies of the network that train side by side on the same batches, each with its own weights of the exits.

In every step the run's optimiser makes, for replica r = 0..R-1, a step on

    L_r = sum_j a_rj w_rj mean(loss_j)    a [R, K] the emphasis, w_rj the strategy's exit weights in the pass that the
                                          replica replaces, loss_j [B] the strategy's exit losses

so that after one pass the R replicas equal the results of R consecutive passes from the same start. Their tensors are
stacked along a new first dimension, and one forward pass under `vmap` runs all of them: it has as many operations as
that of one network, each R times as large. The loss of a replica depends on its own parameters only, so that the
gradient of sum_r L_r contains the gradients of all replicas: only the forward pass needs `vmap`; the backward pass and
the step of SGD do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from exitkit.data.base import Batch
from exitkit.errors import UserError
from exitkit.strategy.base import TrainingStrategy
from exitkit.strategy.composition import Composition
from exitkit.strategy.functional import trained_in
from exitkit.strategy.run import Objective, Run

Named = dict[str, Tensor]


class Replicas:
    """R copies of a run's network, which itself does not change.

    They start with its current parameters and buffers (batch norm's statistics), and without momentum. They need R
    times the memory for trained parameters, gradients, momentum, buffers and activations. Random numbers in a step
    (dropout) are the same for all replicas, as in consecutive passes whose batches are seeded by their position in the
    epoch.

    Args:
        run: the run, with its network, strategy and optimiser.
        emphasis: a [R, K].

    Raises:
        UserError: the precision is fp16, whose loss scale the replicas would share, so that an overflow in one would
            skip the step of all; the optimiser is not SGD, whose step is elementwise; or an exit has the weight zero
            for some replicas only; or a method of the strategy adapts to the losses, which consecutive passes would
            hand it one after the other.
    """

    def __init__(self, run: Run, emphasis: Sequence[Sequence[float]]) -> None:
        if run.precision == "fp16":
            raise UserError("training side by side does not support fp16's one loss scale; expected bf16 or fp32")
        if not isinstance(run.optimizer, torch.optim.SGD):
            raise UserError(f"training side by side does not support {type(run.optimizer).__name__}; expected SGD")
        if adaptive := _adaptive(run.strategy):
            raise UserError(f"training side by side does not support {adaptive[0]}; expected one-by-one")
        run.check_network_alone("training side by side")
        _nonzero_columns(emphasis)
        self._run, self._emphasis = run, emphasis
        stacks = {id(parameter): self._stack(parameter).requires_grad_() for parameter in run.parameters}
        named = run.network.named_parameters()
        self._parameters = {name: stacks[id(parameter)] for name, parameter in named if id(parameter) in stacks}
        self._buffers = {name: self._stack(buffer) for name, buffer in run.network.named_buffers()}
        # SGD is elementwise, so that torch's own SGD makes the steps of all replicas at once.
        groups = run.optimizer.param_groups
        self._optimizer = torch.optim.SGD(
            [{**group, "params": [stacks[id(p)] for p in trained_in(group)]} for group in groups]
        )

    def _stack(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor.detach()] * len(self._emphasis))

    def rehearse(self) -> None:
        """Run the forward pass of all replicas on two images of zeros.

        Raises:
            UserError: a part of the network can't run several replicas at once.
        """
        reference = next(iter(self._parameters.values()))
        images = torch.zeros(2, *self._run.network.input_shape, dtype=reference.dtype, device=reference.device)
        with torch.no_grad(), self._run.seeded("replicas"):
            self._at_once(lambda tensors: self._run.functional(tensors, images).logits)

    def step(self, batch: Batch) -> None:
        """Make one step of every replica on a batch: images [B, C, H, W] and labels [B].

        Raises:
            UserError: the network or the objective can't run several replicas at once, or an exit has the weight zero
                for some of them only.
        """

        def losses_and_logits(tensors: Named) -> tuple[list[Tensor], list[Tensor]]:
            outputs = self._run.functional(tensors, batch[0])
            return self._run.objective(outputs, batch), list(outputs.logits)

        self._run.position.abreast = len(self._emphasis)
        weights = self._weights()
        losses, logits = self._at_once(losses_and_logits)
        flat = [loss.flatten() for loss in losses], [output.flatten(0, 1) for output in logits]
        self._run.meter.add(*flat, torch.cat([batch[1]] * len(self._emphasis)))
        self._update(torch.stack([losses[exit].mean(1) for exit in weights]), list(weights.values()))

    def _at_once(self, function: Callable[[Named], Any]) -> Any:
        """Return the stacked results of `function` for the parameters and buffers of all replicas."""
        try:
            return torch.func.vmap(function, randomness="same")(self._parameters | self._buffers)
        except RuntimeError as error:
            reason = str(error).splitlines()[0].partition(". ")[0]
            if "vmap" not in str(error) and "atching rule" not in str(error):
                raise
            raise UserError(f"training side by side is not possible here ({reason}); expected one-by-one") from error

    def _weights(self) -> dict[int, list[float]]:
        """Return {exit: [a_rj w_rj of every r]}, the exits' weights in the replicas, without exits of weight zero."""
        at = self._run.position
        first, rows = at.passes, []
        for number, emphasis in enumerate(self._emphasis):
            at.passes = first + number
            rows.append([a * w for a, w in zip(emphasis, self._run.weights(), strict=True)])
        at.passes = first
        return _nonzero_columns(rows)

    def _update(self, means: Tensor, weights: list[list[float]]) -> None:
        """Make the step of SGD from the mean losses [exits, R] and their weights."""
        for group, reference in zip(self._optimizer.param_groups, self._run.optimizer.param_groups, strict=True):
            group["lr"] = reference["lr"]
        loss = (means * means.new_tensor(weights)).sum()
        self._run.step(loss, optimizer=self._optimizer)

    def states(self) -> list[Named]:
        """Return each replica's parameters and buffers by name; trained ones, and buffers, are views of the stacks."""
        network = self._run.network
        plain = {name: parameter.detach() for name, parameter in network.named_parameters()}
        stacks = {name: stack.detach() for name, stack in (self._parameters | self._buffers).items()}
        rows = range(len(self._emphasis))
        return [plain | {name: stack[row] for name, stack in stacks.items()} for row in rows]


def _nonzero_columns(rows: Sequence[Sequence[float]]) -> dict[int, list[float]]:
    """Return the columns of weights [R, K] that are not zero, by exit.

    Raises:
        UserError: all columns are zero; or one is zero for some rows only: SGD would have to skip the parameters that
            only that exit reads, without weight decay, in these rows of a stack.
    """
    columns = {exit: list(column) for exit, column in enumerate(zip(*rows, strict=True)) if any(column)}
    if not columns:
        raise UserError("the weights of all exits are zero; expected at least one above zero")
    for exit, column in columns.items():
        if not all(column):
            raise UserError(f"exit {exit + 1} has the weight zero in some replicas; expected none or all side by side")
    return columns


def _adaptive(strategy: Objective) -> list[str]:
    """Return the classes of the methods that adapt to the losses of each forward pass (`observe`)."""
    if isinstance(strategy, Composition):
        return [name for part in strategy.parts.values() for name in _adaptive(part)]
    return [type(strategy).__name__] if type(strategy).observe is not TrainingStrategy.observe else []
