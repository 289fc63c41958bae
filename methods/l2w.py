"""L2W-DEN: a small meta-learned network predicts the weight of each image at each exit.

Paper: Han et al., Learning to Weight Samples for Dynamic Early-exiting Networks, ECCV 2022,
https://arxiv.org/abs/2209.08310. For B images and K exits:

- The weight prediction network g reads the K losses of an image (its `inputs`) and outputs K numbers in (-1, 1). The
  weights are w = 1 + epsilon (g - mean g), with the mean over an image's exits, over the batch, or over both, so that
  they average 1.
- Training minimises sum_k mean_i w_ik l_ik. Each half of every batch is the training half once and the meta half once,
  which gives two steps per batch.
- The meta half is allocated to the exits as in budgeted inference: exit k = 1..K takes the most confident of the
  remaining images, a share p_k ~ q^k of all, and the last exit takes the rest. L_meta = sum_k mean_{i in M_k} l_ik.
- A pseudo step of the optimiser (with momentum and weight decay) leads from theta to theta^(w); Adam updates g by the
  gradient of L_meta(theta^). Then the actual step is made with the weights that the updated g predicts.

The pseudo step is linear in the weights, so that with v = dL_meta/dtheta^ the meta-gradient is exactly

    dL_meta/dw_ik = -(lr / N) <dl_ik/dtheta, v>

for all i and k at once, by one forward-mode product; the tests check that it equals the double backward pass of the
published code. The training half runs forward once for the pseudo step and once for the actual step, from the same
parameters: keeping the first graph would save a tenth of the time, and need as much memory as joint training
(docs/performance.md).

What differs from the published code: its halves are the first and the second half of the (shuffled) batch, here they
are the even and the odd images, so that ranks can share both; its pseudo step and actual step draw different dropout,
here they draw the same; and here a batch of fewer than four images makes one step without a meta half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from exitkit.methods.allocation import allocate, confidences
from exitkit.networks import Outputs
from exitkit.strategy import UPDATE, Batch, Run, TrainingStrategy, UserError, setting, weighted_sum

NETWORK = {"weights": ("predicted", "frozen")}
LEARNING = {"weights": ("predicted",)}
ALLOCATING = {"weights": ("predicted", "allocated")}


@dataclass(eq=False)
class LearnedWeights(TrainingStrategy):
    """L2W-DEN: a meta-learned network predicts the weight of every image at every exit.

    Han et al., ECCV 2022, https://arxiv.org/abs/2209.08310

    L = sum_k mean_i w_ik l_ik, with losses l [B, K] and weights w = 1 + epsilon (g(l) - mean g(l)) [B, K] by a network
    g that is trained on dL_meta/dw_ik = -(lr / N) <dl_ik/dtheta, dL_meta/dtheta^>.

    Example:
        >>> exitkit.build_strategy("l2w", epsilon=0.3, normalise="all", interval=100).epsilon
        0.3
    """

    slots: ClassVar[frozenset[str]] = frozenset({UPDATE})
    removed: ClassVar[Mapping[str, Any]] = {"gradient": "forward"}
    paper: ClassVar[str] = "Han et al., Learning to Weight Samples for Dynamic Early-exiting Networks, ECCV 2022"

    weights: Literal["predicted", "frozen", "fixed", "allocated"] = setting(
        "predicted",
        "predicted by the meta-learned network, by that network frozen, all 1, or only where an image would exit",
    )
    frozen_from: str | None = setting(
        None, "folder of a finished l2w run whose network predicts the weights (with weights=frozen)"
    )
    inputs: Literal["loss", "confidence", "both"] = setting("loss", "inputs of the network", needs=NETWORK)
    normalise: Literal["exits", "samples", "all"] = setting(
        "exits",
        "the weights average 1 over an image's exits (CIFAR), an exit's batch, or both (ImageNet)",
        needs=NETWORK,
    )
    epsilon: float = setting(
        0.8, "range of the weights around 1 (CIFAR 0.8, ImageNet 0.3)", search=(0.2, 1.0), needs=NETWORK
    )
    q: float = setting(0.75, "ratio of the shares of neighbouring exits", search=(0.5, 1.5), needs=ALLOCATING)
    objective: Literal["allocated", "vanilla"] = setting(
        "allocated",
        "meta loss of each exit: on the images that would leave there, or on all images",
        needs=LEARNING,
    )
    interval: int = setting(1, "batches between two updates of the network (CIFAR 1, ImageNet 100)", needs=LEARNING)
    hidden: int = setting(500, "width of the network's hidden layer", needs=NETWORK)
    meta_lr: float = setting(1e-4, "learning rate of the network (Adam, cosine)", needs=LEARNING)
    meta_weight_decay: float = setting(1e-4, "weight decay of the network", needs=LEARNING)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epsilon", "q", "meta_lr"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name} is {getattr(self, name)}; expected above 0")
        for name in ("interval", "hidden"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.frozen_from is not None and self.weights != "frozen":
            raise UserError(f"frozen_from is for weights=frozen, and weights is {self.weights}")
        if self.meta_weight_decay < 0:
            raise UserError(f"meta_weight_decay is {self.meta_weight_decay}; expected at least 0")

    def unused_settings(self, yielded: frozenset[str] = frozenset()) -> dict[str, str]:
        """Return the settings without effect; the meta loss on all images needs no shares of the exits."""
        allocates = self.weights == "allocated" or self.objective == "allocated"
        return super().unused_settings(yielded) | ({} if allocates else {"q": "objective=allocated"})

    def refuses(self) -> Mapping[str, str]:
        """Refuse other optimisers than SGD, whose step is linear in the gradient."""
        return {"optimizer": "its pseudo steps are steps of SGD"} if self.weights == "predicted" else {}

    def prepare(self, run: Run) -> None:
        """Make the weight prediction network, if it is used."""
        if self.weights not in ("predicted", "frozen"):
            return
        if self.weights == "predicted":
            run.check_pseudo_steps()
        exits = run.network.num_exits
        reads = exits * (2 if self.inputs == "both" else 1)
        layers = [nn.Linear(reads, self.hidden), nn.ReLU(), nn.Linear(self.hidden, exits), nn.Tanh()]
        run.auxiliary(
            "weights",
            nn.Sequential(*layers).to(next(run.network.parameters()).dtype),
            lambda parameters: torch.optim.Adam(parameters, self.meta_lr, weight_decay=self.meta_weight_decay),
        )
        if self.frozen_from is not None:
            run.load_auxiliary("weights", self.frozen_from)

    def ingredients(self) -> tuple[str, ...]:
        """Return the run whose network predicts the weights, if there is one."""
        return () if self.frozen_from is None else (self.frozen_from,)

    def train_step(self, run: Run, batch: Batch) -> None:
        """Make two steps: each half of the batch is the training half once, and the meta half once."""
        halves = run.halves(batch)
        if halves is None:
            losses, outputs = run.losses_and_outputs(batch)
            self._real_step(run, batch, losses, outputs)
            return
        for number, (training, meta) in enumerate((halves, halves[::-1])):
            if self.weights == "predicted" and run.position.batch % self.interval == 0:
                self._meta_step(run, training, meta, number)
            with run.seeded(f"half {number}", alike=False):
                losses, outputs = run.losses_and_outputs(training)
            self._real_step(run, training, losses, outputs)

    def _real_step(self, run: Run, batch: Batch, losses: Sequence[Tensor], outputs: Outputs) -> None:
        """Step on  sum_k a_k mean_i w_ik l_ik,  with the exits' own weights a_k."""
        with torch.no_grad():
            weights = self._sample_weights(run, batch, losses, outputs)
        run.step(weighted_losses(run, losses, weights), batch)

    def _meta_step(self, run: Run, training: Batch, meta: Batch, number: int) -> None:
        """Update the weight prediction network by the gradient of L_meta after the pseudo step."""
        side = run.auxiliaries["weights"]
        for group in side.optimizer.param_groups:
            group["lr"] = self.meta_lr * 0.5 * (1 + math.cos(math.pi * run.position.fraction))
        predicted, rates = self._meta_gradient(run, training, meta, number)
        # dL/dg = epsilon (I - mean) dL/dw, since the projection that subtracts the mean is symmetric.
        gradient = self.epsilon * (rates - self._mean(run, rates, training))
        side.step((gradient.to(predicted.dtype) * predicted).sum(1).mean(), training)

    def _meta_gradient(self, run: Run, training: Batch, meta: Batch, number: int) -> tuple[Tensor, Tensor]:
        """Return the predictions g [B, K] for the training half, and N dL_meta/dw [B, K]."""
        # theta^, the result of a step on  sum_k mean_i w_ik l_ik
        with run.seeded(f"half {number}", alike=False):
            outputs = run.functional({}, training[0], batchnorm="kept")
        losses = run.objective(outputs, training)
        predicted = self._predicted(run, losses, outputs)
        loss = weighted_losses(run, losses, self._normalised(run, predicted.detach(), training))
        pseudo = run.pseudo_step(run.gradients(loss, run.parameters, training))
        del outputs, losses, loss  # frees the graph before that of the meta half is made
        # v = dL_meta/dtheta^
        slope = self._meta_slope(run, meta, pseudo.parameters, number)
        # dL_meta/dw_ik = -(lr / N) <dl_ik/dtheta, v>
        direction = {name: pseudo.slopes[name] * value for name, value in slope.items()}
        with run.seeded(f"half {number}", alike=False):
            rates = torch.stack(run.loss_tangents(training, direction), 1)
        return predicted, rates * rates.new_tensor(list(run.weights()))

    def _meta_slope(self, run: Run, meta: Batch, parameters: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """Return v = dL_meta/dtheta^ by parameter name."""
        with run.seeded(f"meta {number}", alike=False):
            outputs = run.functional(parameters, meta[0], batchnorm="kept")
        losses = run.objective(outputs, meta)
        loss = weighted_losses(run, losses, self._allocation(run, outputs) if self.objective == "allocated" else None)
        gradients = run.gradients(loss, list(parameters.values()), meta)
        return {name: value for name, value in zip(parameters, gradients, strict=True) if value is not None}

    def sample_weights(self, run: Run, losses: Sequence[Tensor], outputs: Outputs) -> Tensor | None:
        """Return the weights [B, K], or None where all are 1."""
        return self._sample_weights(run, None, losses, outputs)

    def _sample_weights(
        self, run: Run, batch: Batch | None, losses: Sequence[Tensor], outputs: Outputs
    ) -> Tensor | None:
        if self.weights == "fixed":
            return None
        if self.weights == "allocated":
            return self._allocation(run, outputs)
        return self._normalised(run, self._predicted(run, losses, outputs), batch)

    def _allocation(self, run: Run, outputs: Outputs) -> Tensor:
        """Return normalised weights [B, K], which are 0 except at the exit where the image would leave."""
        local = confidences(outputs)
        return run.local_rows(allocate(run.gather(local), self.q), local)

    def _predicted(self, run: Run, losses: Sequence[Tensor], outputs: Outputs) -> Tensor:
        """Return the weight prediction network's output for each image, [B, K]."""
        network = run.auxiliaries["weights"].module
        inputs = [torch.stack([loss.detach() for loss in losses], 1)] if self.inputs != "confidence" else []
        inputs += [confidences(outputs)] if self.inputs != "loss" else []
        predicted: Tensor = network(torch.cat(inputs, 1).to(next(network.parameters()).dtype))
        return predicted

    def _normalised(self, run: Run, predicted: Tensor, batch: Batch | None) -> Tensor:
        return 1 + self.epsilon * (predicted - self._mean(run, predicted, batch))

    def _mean(self, run: Run, values: Tensor, batch: Batch | None) -> Tensor:
        """Return the mean of values [B, K] over an image's exits, an exit's batch, or both; see `normalise`."""
        if self.normalise == "exits":
            return values.mean(1, keepdim=True)
        return run.mean(values.mean(0, keepdim=True) if self.normalise == "samples" else values.mean(), batch)


def weighted_losses(run: Run, losses: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """Return  sum_k a_k mean_i w_ik l_ik,  with the exits' own weights a_k."""
    if weights is not None:
        losses = [column * loss for column, loss in zip(weights.unbind(1), losses, strict=True)]
    return weighted_sum(losses, run.weights())
