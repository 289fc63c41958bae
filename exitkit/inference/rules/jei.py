"""The rule `jei`: a learned gate at every exit but the last decides from four measures of uncertainty.

Paper: Regol, Chataoui and Coates, "Jointly-learned exit and inference for a dynamic neural network: JEI-DNN",
ICLR 2024 (https://arxiv.org/abs/2310.09163).

    m_k = (max p, H(p), p_(1) - p_(2), H(p^2 / sum p^2)) of exit k                         [N, 4]
    g_k = sigmoid(w_k m_k + b_k),  k = 0..K-2                                              [N]
    target: k* = argmin_k CE_k + price C_k / C_{K-1};  exit k should let the sample leave if k >= k*
    probability of leaving:  P_k = max(0, min(g_k, 1 - sum_{j<k} g_j))
    leave at the first k with h_k = P_k / (1 - sum_{j<k} P_j) >= 1/2

H is the entropy in nats. As sum_{j<=k} P_j = min(1, sum_{j<=k} g_j), the memory is the sum of the g. The loss of the
gates is the binary cross-entropy, mean over gates and samples; positive samples of gate k weigh
min(negatives / positives, 5), where only k = k* counts as positive. The paper's prices are .01 to 7; here they are 40
operating points, geometrically spaced, from 7 down.

What differs from the paper: only the gates are trained, on validation outputs, all prices at once, by stochastic
gradient descent (rate .01 with cosine decay to 2e-4, momentum .9, weight decay 5e-4, batches of 64, 15 epochs and at
least 2,400 steps, since after 15 epochs of 1,000 samples gates are far from their optimum). The paper alternates
between gates and the heads of a frozen network. The released loss of the heads does not depend on the gates: it
weights the losses L [N, K-1] by P and divides by the mean weight without detaching it,

    mean(P L sum(L) / sum(P L)) = mean(L)

in value and in gradient (a test shows it), so that the heads are trained as by joint training with equal weights. If a
gate has no negative sample, its positives weigh 1 here: the formula's weight would be 0, and the gate would not be
trained.

Shapes: N samples, K exits, C classes, P prices.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, cos, pi
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from exitkit.inference.outputs import ExitView
from exitkit.inference.rules.base import Booleans, SequentialRule, Validation
from exitkit.inference.scores import below_top
from exitkit.inference.thresholds import Floats, Integers

PRICES = tuple(np.geomspace(7, 0.01, 40).tolist())
EPOCHS, STEPS, BATCH = 15, 2400, 64
HIGHEST_RATE, LOWEST_RATE, MOMENTUM, DECAY = 0.01, 2e-4, 0.9, 5e-4
HEAVIEST = 5.0
"""The largest weight of a positive sample."""
MEASURES = 4


@dataclass(frozen=True, eq=False)
class GateRule(SequentialRule):
    """The rule `jei`.

    Args:
        gates: (w_k, b_k) of exits 0..K-2, [P, K-1, 5].
    """

    name: ClassVar[str] = "jei"
    per_point: ClassVar[tuple[str, ...]] = ("gates",)

    gates: Floats

    @property
    def exits(self) -> int:
        """The number of exits, K."""
        return int(self.gates.shape[1]) + 1

    def decide(self, view: ExitView, memory: Any) -> tuple[Booleans, Any]:
        """Return which samples leave, [N, P], and the memory, the sum of the g, [N, P]; see `SequentialRule.decide`."""
        # Imported when used: commands that leave nothing early need not load scipy.
        from scipy.special import expit

        weights = self.gates[:, view.index]
        # Summed measure by measure: a matrix product may round differently for another number of rows.
        activation: Floats = weights[None, :, MEASURES]
        for place, measure in enumerate(measures(view).T):
            activation = activation + measure[:, None] * weights[:, place]
        gate = expit(activation)
        total = np.zeros_like(gate) if memory is None else memory
        return leaving_probability(gate, total) >= 0.5, total + gate


def measures(view: ExitView) -> Floats:
    """Return max p, H(p), margin and H(p^2 / sum p^2), [N, 4], of an exit."""
    entropies = view.entropies
    return np.stack([view.score("confidence"), entropies[:, 0], view.score("margin"), entropies[:, 1]], axis=1)


def leaving_probability(gate: ArrayLike, before: ArrayLike) -> Floats:
    """Return h_k, the probability of leaving at exit k of a sample that reaches it, from g_k and sum_{j<k} g_j.

    It is 1 where the sum of the earlier gates is 1 or more: all the probability has been given away before.
    """
    g, remaining = np.asarray(gate, dtype=np.float64), 1 - np.asarray(before, dtype=np.float64)
    result: Floats = np.where(remaining > g, g / np.where(remaining > g, remaining, 1), 1.0)
    return result


def best_exits(logits: ArrayLike, labels: ArrayLike, costs: ArrayLike, price: ArrayLike) -> Integers:
    """Return k*, [N, P]: the exit with the lowest cross-entropy + price C_k / C_{K-1}.

    Args:
        logits: [N, K, C].
        labels: [N].
        costs: [K].
        price: [P].
    """
    outputs, label, cost = np.asarray(logits), np.asarray(labels), np.asarray(costs, dtype=np.float64)
    samples, exits, _ = outputs.shape
    losses = np.empty((samples, exits))
    for k in range(exits):
        z = below_top(outputs[:, k], k + 1)
        losses[:, k] = np.log(np.exp(z).sum(axis=1)) - z[np.arange(samples), label]
    at = [(losses + each * cost / cost[-1]).argmin(axis=1) for each in np.asarray(price, dtype=np.float64)]
    return np.stack(at, axis=1)


def positive_weights(best: Integers, exits: int) -> Floats:
    """Return the weight of the positive samples of each gate, [K-1, P], from k* [N, P]."""
    positives = (best == np.arange(exits - 1)[:, None, None]).sum(axis=1)
    negatives = len(best) - positives
    weights: Floats = np.minimum(negatives / np.maximum(positives, 1), HEAVIEST)
    weights[positives == 0] = HEAVIEST
    weights[negatives == 0] = 1
    return weights


def gate_gradient(gates: Floats, inputs: Floats, leaves: Booleans, weights: Floats) -> Floats:
    """Return the gradient of the weighted binary cross-entropy of each price, mean over gates and samples, [K-1, 5, P].

    Args:
        gates: (w_k, b_k), [K-1, 5, P].
        inputs: (m_k, 1), [N, K-1, 5].
        leaves: whether the gate should let the sample leave, [N, K-1, P].
        weights: weights of the samples, [N, K-1, P].
    """
    # Imported when used, as in `decide`.
    from scipy.special import expit

    by_gate = inputs.transpose(1, 0, 2)
    slope = by_gate @ gates
    expit(slope, out=slope)
    slope -= leaves.transpose(1, 0, 2)
    slope *= weights.transpose(1, 0, 2)
    slope /= inputs.shape[0] * inputs.shape[1]
    gradient: Floats = by_gate.transpose(0, 2, 1) @ slope
    return gradient


def fit(validation: Validation, *, seed: int = 0) -> GateRule:
    """Return the rule; see `rules.fit_rule`.

    Args:
        validation: the outputs.
        seed: seed of the initial gates and of the batches.

    Raises:
        UserError: a logit is not finite.
    """
    samples, exits, _ = validation.logits.shape
    best = best_exits(validation.logits, validation.labels, validation.costs, PRICES)
    generator = np.random.default_rng(seed)
    # The initial weights are those of a linear layer with four inputs.
    gates = generator.uniform(-0.5, 0.5, (exits - 1, MEASURES + 1, len(PRICES)))
    if exits == 1:
        return GateRule(gates.transpose(2, 0, 1))
    inputs = np.ones((samples, exits - 1, MEASURES + 1))
    for view in validation.outputs.exits[:-1]:
        inputs[:, view.index, :MEASURES] = measures(view)
    leaves = best[:, None] <= np.arange(exits - 1)[:, None]
    weights = np.where(leaves, positive_weights(best, exits), 1.0)
    velocity = np.zeros_like(gates)
    epochs = max(EPOCHS, ceil(STEPS / ceil(samples / BATCH)))
    for epoch in range(epochs):
        rate = LOWEST_RATE + (HIGHEST_RATE - LOWEST_RATE) * (1 + cos(pi * epoch / epochs)) / 2
        order = generator.permutation(samples)
        for first in range(0, samples, BATCH):
            rows = order[first : first + BATCH]
            velocity *= MOMENTUM
            velocity += gate_gradient(gates, inputs[rows], leaves[rows], weights[rows])
            velocity += DECAY * gates
            gates -= rate * velocity
    return GateRule(np.ascontiguousarray(gates.transpose(2, 0, 1)))
