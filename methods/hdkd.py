"""HDKD: every exit learns from all later ones, with a learned weight of each of these losses.

Paper: after Wang and Li, Harmonized Dense Knowledge Distillation Training for Multi-Exit Architectures, AAAI 2021,
https://doi.org/10.1609/aaai.v35i11.17225

With exits i = 0..K-1, logits z_i [B, C], labels y and softmax s, the M = K + K (K - 1) / 2 terms are

    CE(z_i, y)     and     T^2 KL(s(z_j / T) || s(z_i / T))  for i < j, where the gradient of z_j is stopped,

and training minimises  L(theta, r) = sum_m r_m mean_b t_mb  for terms t [M, B] and weights r [M]. The weights minimise
the label losses on images that the step does not use (a bilevel problem), by gradient descent that alternates with the
network's.

What differs: this much is in the paper's abstract; the code is not published, and this file is not a reproduction. The
rest is defined as follows.

- r = M softmax(eta) with the initial value eta = 0, so that all weights are 1 at first, and their mean is always 1.
- Each half of every batch is the training half once (as in L2W-DEN): a pseudo step of the optimiser on its L, with
  momentum and weight decay, leads to theta^; with L_meta = sum_k mean CE on the other half, Adam updates eta by
  dL_meta/deta = sum_m dL_meta/dr_m dr_m/deta. The pseudo step is linear in r, so that for v = dL_meta/dtheta^

      dL_meta/dr_m = -(lr / N) sum_b <dt_mb/dtheta, v>

  for all m at once, by one forward-mode product. Then the actual step is made with the updated weights.
- The paper's temperature and learning rate of the weights are not known; the defaults are T = 1, and Adam with 1e-3.

With `learn = false` all weights are 1, and each batch is one step; with one exit, or fewer than four images in a batch,
the weights are not updated, and the batch is one step on L.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from exitkit.methods.distillation import distillation_losses
from exitkit.networks import Outputs
from exitkit.strategy import (
    OBJECTIVE,
    UPDATE,
    Batch,
    LearnedTable,
    Run,
    TrainingStrategy,
    UserError,
    setting,
    weighted_sum,
)


class TermWeights(nn.Module):
    """r = M softmax(eta), [M]: M weights that average 1."""

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.eta = nn.Parameter(torch.zeros(terms))

    def forward(self) -> Tensor:
        """Return r."""
        return len(self.eta) * self.eta.softmax(0)


def pupils(exits: int) -> list[int]:
    """Return the exit that each of the M terms trains: per exit, the label's term and then those of the later exits."""
    return [index for index in range(exits) for _ in range(index, exits)]


@dataclass(eq=False)
class HarmonisedDistillation(TrainingStrategy):
    """HDKD: every exit learns from all later ones, with a learned weight of each loss (not a reproduction).

    After Wang and Li, AAAI 2021, https://doi.org/10.1609/aaai.v35i11.17225

    L = sum_i r_i CE(z_i, y) + sum_{i<j} r_ij T^2 KL(softmax(z_j / T) || softmax(z_i / T)) for logits z_i [B, C], with
    weights r = M softmax(eta) [M] that descend the exits' label losses on the other half of the batch.

    Example:
        >>> sorted(exitkit.build_strategy("hdkd", learn=False).claims())
        ['objective']
    """

    slots: ClassVar[frozenset[str]] = frozenset({OBJECTIVE, UPDATE})
    paper: ClassVar[str] = (
        "after Wang and Li, Harmonized Dense Knowledge Distillation Training for Multi-Exit Architectures, AAAI 2021"
    )

    temperature: float = setting(1.0, "T, temperature of both softmaxes", search=(1.0, 5.0))
    learn: bool = setting(True, "learn the weights of the terms; false: all 1")
    meta_lr: float = setting(1e-3, "learning rate of the weights (Adam)", needs={"learn": (True,)})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "meta_lr"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name} is {getattr(self, name)}; expected above 0")

    def claims(self) -> frozenset[str]:
        """Claim the update only if the weights are learned."""
        return self.slots if self.learn else frozenset({OBJECTIVE})

    def refuses(self) -> Mapping[str, str]:
        """Refuse other optimisers than SGD, whose step is linear in the gradient."""
        return {"optimizer": "its pseudo steps are steps of SGD"} if self.learn else {}

    def prepare(self, run: Run) -> None:
        """Make eta."""
        exits = run.network.num_exits
        if self.learn:
            run.check_pseudo_steps()
            weights = TermWeights(exits * (exits + 1) // 2).to(next(run.network.parameters()).dtype)
            run.auxiliary("terms", weights, lambda parameters: torch.optim.Adam(parameters, self.meta_lr))

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return L_i [B] of every exit: the weighted sum of its terms."""
        terms = self._terms(outputs, batch)
        with torch.no_grad():
            weights = run.auxiliaries["terms"].module() if self.learn else [1.0] * len(terms)
        weighted = list(zip(pupils(len(outputs.logits)), weights, terms, strict=True))
        return [
            torch.stack([weight * term for pupil, weight, term in weighted if pupil == index]).sum(0)
            for index in range(len(outputs.logits))
        ]

    def _terms(self, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return the M terms [B]: per exit, the label's term and then those of the later exits in order."""
        terms = []
        for index, pupil in enumerate(outputs.logits):
            terms.append(self.cross_entropy(pupil, batch[1]))
            later = outputs.logits[index + 1 :]
            terms += [distillation_losses(pupil, teacher, self.temperature) for teacher in later]
        return terms

    def train_step(self, run: Run, batch: Batch) -> None:
        """Make two steps: each half of the batch is the training half once, and the meta half once."""
        halves = run.halves(batch) if self.learn and run.network.num_exits > 1 else None
        if halves is None:
            super().train_step(run, batch)
            return
        for number, (training, meta) in enumerate((halves, halves[::-1])):
            self._meta_step(run, training, meta, number)
            with run.seeded(f"half {number}", alike=False):
                losses = run.losses(training)
            run.step(weighted_sum(losses, run.weights()), training)

    def _meta_step(self, run: Run, training: Batch, meta: Batch, number: int) -> None:
        """Update eta by the gradient of L_meta after the pseudo step."""
        # theta^, the result of a step on L
        with run.seeded(f"half {number}", alike=False):
            outputs = run.functional({}, training[0], batchnorm="kept")
        loss = weighted_sum(run.objective(outputs, training), run.weights())
        pseudo = run.pseudo_step(run.gradients(loss, run.parameters, training))
        del outputs, loss  # frees the graph before that of the meta half is made
        # v = dL_meta/dtheta^
        with run.seeded(f"meta {number}", alike=False):
            outputs = run.functional(pseudo.parameters, meta[0], batchnorm="kept")
        labels = [self.cross_entropy(logits, meta[1]) for logits in outputs.logits]
        slope = run.gradients(weighted_sum(labels, run.weights()), list(pseudo.parameters.values()), meta)
        # dL_meta/dr_m = -(lr / N) sum_b <dt_mb/dtheta, v>
        named = zip(pseudo.parameters, slope, strict=True)
        direction = {name: pseudo.slopes[name] * value for name, value in named if value is not None}
        with run.seeded(f"half {number}", alike=False):
            tangents = run.loss_tangents(training, direction, lambda outputs: self._terms(outputs, training))
        rates = run.mean(torch.stack(tangents, 1).mean(0), training)
        rates = rates * rates.new_tensor([run.weights()[index] for index in pupils(run.network.num_exits)])
        side = run.auxiliaries["terms"]
        weights: Tensor = side.module()
        side.step((rates.to(weights.dtype) * weights).sum(), training)

    def learned(self, run: Run) -> list[LearnedTable]:
        """Return r / M, by the exit that is trained and the source of the loss."""
        if not self.learn:
            return []
        exits = run.network.num_exits
        names = [f"exit {index + 1}" for index in range(exits)]
        shares = next(run.auxiliaries["terms"].module.parameters()).detach().softmax(0).tolist()
        rows = [[share for pupil, share in zip(pupils(exits), shares, strict=True) if pupil == i] for i in range(exits)]
        values = [[row[0], *[None] * (exits - len(row)), *row[1:]] for row in rows]
        return [LearnedTable("share of each loss in the sum", names, ["label", *names[1:]], values)]
