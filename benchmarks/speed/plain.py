"""Reference implementations of methods with the computations of the published code, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from exitkit.methods.l2w import LearnedWeights, weighted_losses
from exitkit.strategy import Batch, LocalBatch, Run


class DoubleBackward(LearnedWeights):
    """L2W-DEN with the meta-gradient by double backward through the pseudo step."""

    def _meta_gradient(self, run: Run, training: Batch, meta: Batch, number: int) -> tuple[Tensor, Tensor]:
        assert isinstance(training, LocalBatch)
        with run.seeded(f"half {number}", alike=False):
            outputs = run.functional({}, training[0], batchnorm="kept")
        losses = run.objective(outputs, training)
        predicted = self._predicted(run, losses, outputs)
        weights = self._normalised(run, predicted.detach(), training).requires_grad_()
        share = training.rank_weight
        loss = weighted_losses(run, losses, weights)
        loss = loss.nan_to_num() if share == 0 else loss * share
        gradients = torch.autograd.grad(loss, run.parameters, create_graph=True, allow_unused=True)
        copies = [None if gradient is None else gradient.detach().clone() for gradient in gradients]
        run._engine.ranks.average(copies)
        pseudo = run.pseudo_step(copies)
        slope = self._meta_slope(run, meta, pseudo.parameters, number)
        direction = {name: pseudo.slopes[name] * value for name, value in slope.items()}
        reached = zip(pseudo.parameters, (g for g in gradients if g is not None), strict=True)
        pairs = [(gradient, direction[name]) for name, gradient in reached if name in direction]
        changes, along = zip(*pairs, strict=True)
        rates = torch.autograd.grad(changes, weights, along, retain_graph=True)[0]
        mean = weights.mean(0).sum()
        mean = mean.nan_to_num() if share == 0 else mean * share
        return predicted, rates / torch.autograd.grad(mean, weights)[0]  # for one image
