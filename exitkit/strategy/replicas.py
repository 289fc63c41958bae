"""Replicas: copies of the network that train side by side on the same batches, each with its own weights of the exits.

Replica r = 0..R-1 makes in every step the step of the run's optimiser on

    L_r = sum_j a_rj w_rj mean(loss_j)    a [R, K] the emphasis, w_rj the strategy's exit weights in the pass that the
                                          replica stands for, loss_j [B] the strategy's exit losses

so that after one pass R replicas are what R passes would have made, one after the other and each from the same start.
All their tensors are stacked along a new first dimension, and one forward under `vmap` runs them: it begins as many
operations as one network does, each R times as large. No replica's loss reads another's parameters, so the gradient of
sum_r L_r is each one's own: `vmap` is needed forward only, and backward and the step of SGD are the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from exitkit.data.base import Batch
from exitkit.errors import UserError
from exitkit.strategy.run import Run

Named = dict[str, Tensor]


class Replicas:
    """R copies of a run's network, which itself stays as it is.

    They begin with its parameters and buffers (batch norm's statistics) of now, and without momentum. They hold R times
    the trained parameters, each with its gradient and momentum, and the buffers; a step holds R times the activations.
    What is drawn at random in a step (dropout) is drawn once, for all alike: as passes one after the other draw it
    where every batch is seeded by its place in the epoch.

    Args:
        run: whose network, strategy and optimiser these are.
        emphasis: a [R, K].

    Raises:
        UserError: fp16, whose loss scale they would share, so that one's overflow would stop all; or an optimiser other
            than SGD, whose step may look at a tensor as a whole; or an exit that counts nothing for some replicas only.
    """

    def __init__(self, run: Run, emphasis: Sequence[Sequence[float]]) -> None:
        if run.precision == "fp16":
            raise UserError("replicas side by side can't share fp16's one loss scale; expected precision bf16 or fp32")
        if not isinstance(run.optimizer, torch.optim.SGD):
            raise UserError(f"replicas side by side can't train by {type(run.optimizer).__name__}; expected SGD")
        run.check_network_alone("training side by side")
        _asked(emphasis)
        self._run, self._emphasis = run, emphasis
        stacks = {id(parameter): self._stack(parameter).requires_grad_() for parameter in run.parameters}
        named = run.network.named_parameters()
        self._parameters = {name: stacks[id(parameter)] for name, parameter in named if id(parameter) in stacks}
        self._buffers = {name: self._stack(buffer) for name, buffer in run.network.named_buffers()}
        # SGD looks at every number alone: torch's own makes the step of all replicas at once.
        groups = run.optimizer.param_groups
        self._optimizer = torch.optim.SGD(
            [{**group, "params": [stacks[id(p)] for p in group["params"]]} for group in groups]
        )

    def _stack(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor.detach()] * len(self._emphasis))

    def rehearse(self) -> None:
        """Run all replicas forward on two empty images.

        Raises:
            UserError: the network has a part that can't be run for several replicas at once.
        """
        reference = next(iter(self._parameters.values()))
        images = torch.zeros(2, *self._run.network.input_shape, dtype=reference.dtype, device=reference.device)
        with torch.no_grad(), self._run.seeded("replicas"):
            self._at_once(lambda tensors: self._run.functional(tensors, images).logits)

    def step(self, batch: Batch) -> None:
        """Let every replica make one step on a batch: images [B, C, H, W] and labels [B].

        Raises:
            UserError: network or objective can't be run for several replicas at once, or an exit's weight is zero for
                some of them only.
        """

        def one(tensors: Named) -> tuple[list[Tensor], list[Tensor]]:
            outputs = self._run.functional(tensors, batch[0])
            return self._run.objective(outputs, batch), list(outputs.logits)

        self._run.position.abreast = len(self._emphasis)
        weights = self._weights()
        losses, logits = self._at_once(one)
        flat = [loss.flatten() for loss in losses], [output.flatten(0, 1) for output in logits]
        self._run.meter.add(*flat, batch[1].repeat(len(self._emphasis)))
        self._update(torch.stack([losses[exit].mean(1) for exit in weights]), list(weights.values()))

    def _at_once(self, function: Callable[[Named], Any]) -> Any:
        """Return `function` of every replica's parameters and buffers, stacked."""
        try:
            return torch.func.vmap(function, randomness="same")(self._parameters | self._buffers)
        except RuntimeError as error:
            reason = str(error).splitlines()[0].partition(". ")[0]
            if "vmap" not in str(error) and "atching rule" not in str(error):
                raise
            raise UserError(f"replicas can't train side by side here ({reason}); expected one by one") from error

    def _weights(self) -> dict[int, list[float]]:
        """Return what each exit that is asked counts in each replica now: {exit: [a_rj w_rj of every r]}."""
        at = self._run.position
        first, rows = at.passes, []
        for number, emphasis in enumerate(self._emphasis):
            at.passes = first + number
            rows.append([a * w for a, w in zip(emphasis, self._run.weights(), strict=True)])
        at.passes = first
        return _asked(rows)

    def _update(self, means: Tensor, weights: list[list[float]]) -> None:
        """Make the step of SGD from the mean losses [exits, R] and their weights."""
        for ours, theirs in zip(self._optimizer.param_groups, self._run.optimizer.param_groups, strict=True):
            ours["lr"] = theirs["lr"]
        loss = (means * means.new_tensor(weights)).sum()
        self._run.step(loss, optimizer=self._optimizer)

    def states(self) -> list[Named]:
        """Return each replica's parameters and buffers by name; views of the stacks, where those were trained."""
        network = self._run.network
        plain = {name: parameter.detach() for name, parameter in network.named_parameters()}
        stacks = {name: stack.detach() for name, stack in (self._parameters | self._buffers).items()}
        rows = range(len(self._emphasis))
        return [plain | {name: stack[row] for name, stack in stacks.items()} for row in rows]


def _asked(rows: Sequence[Sequence[float]]) -> dict[int, list[float]]:
    """Return the columns of weights [R, K] that are not zero, by exit.

    Raises:
        UserError: there is none; or one is zero in part: what only that exit reads would have to be left alone, without
            even decaying, in some rows of a stack.
    """
    columns = {exit: list(column) for exit, column in enumerate(zip(*rows, strict=True)) if any(column)}
    if not columns:
        raise UserError("every exit's weight is zero, so that there is nothing to train on; expected one above zero")
    for exit, column in columns.items():
        if not all(column):
            raise UserError(f"exit {exit + 1} counts nothing in some replicas; side by side, it has to count in all")
    return columns
