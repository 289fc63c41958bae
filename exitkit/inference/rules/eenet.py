"""The rule `eenet`: learned scores of the exits, and learned shares of the samples that leave at each.

Paper: Ilhan et al., "Adaptive deep neural network inference optimization with EENet", WACV 2024
(https://arxiv.org/abs/2301.07099). Of exit k, with its class probabilities p_k [N, C]:

    score:  q_k = clamp(u_k p_k + v_k (max p_k, 1 + sum p_k log p_k / log C, q_0 .. q_{k-1}), 0, 1)     [N]
    share:  r = softmax_k(h),  h_k = b_k sigmoid(A_k x_k),  x_k = (p_k, max p_k, .., q_{k-1})           [N, K]
    losses: score  (1/K) sum_k sum_i r_ik / (sum_j r_jk) BCE(q_ik, [exit k is right on i])
            share  alpha_1 KL(t || r) + alpha_2 |mean_i sum_k r_ik C_k - B| / B,   t_ik = q_ik / sum_j q_ij

Each budget B is one operating point. A_k and b_k have constants; earlier scores are detached. The scores and the shares
are trained in turn. A deployment uses the scores and thresholds at which floor(N mean_i r_ik) validation samples leave
at exit k, as `shares` does; many equal scores, such as those clamped to 1, leave together.

What differs. The released code of the learned scores does not run: its class term u_k p_k is added to a term of one
more dimension and broadcast to [N, N, 1], so that every sample gets the class term of the batch's first sample (a test
shows it), the past scores have too many dimensions to be concatenated, and one of the values it returns is undefined.
It never sets gradients to zero, and its best model is the last one. The formulas above are the method; published
figures cannot be reproduced from that code. Further differences, all ours:

- h is linear. The released sigmoid around h limits each share to [1 / (1 + (K-1) e), e / (e + K-1)], for K = 7 to
  .058 .. .312, so that budgets near C_0 or C_{K-1} cannot be met.
- After training, h_k is shifted by s C_k / C_{K-1}, with s such that the planned cost is B exactly: the closest shares,
  in KL divergence, that meet the budget. The paper keeps restarts within 10% of B, the best of ten.
- There are 12 budgets, evenly spaced between C_0 and C_{K-1}. Training at the first starts at q_k = max p_k, the rule
  `shares` on confidence, and at every other where the budget before has ended; it takes 120 steps of Adam for the
  scores and 120 for the shares (40 each at later budgets), of rate 3e-3, in turns of ten. The code trains ten times at
  each budget, for 1,000 epochs of rate 3e-5, in turns of ten epochs; that takes hours on one core. Batch size 512,
  weight decay 1e-2, alpha_1 = 1e-3, alpha_2 = 1e-2, and hidden units, half as many as inputs, are those of the code.

Shapes: N samples, K exits, C classes, P budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from exitkit.inference.rules.base import Booleans, SequentialRule, Validation
from exitkit.inference.scores import below_top, exit_scores
from exitkit.inference.thresholds import Floats, Integers, thresholds

BUDGETS = 12
TURNS, LATER_TURNS, STEPS, BATCH = 12, 4, 10, 512
RATE, DECAY = 3e-3, 1e-2
KL_WEIGHT, COST_WEIGHT = 1e-3, 1e-2
WIDTH = 0.5
"""Hidden units of the shares, as a fraction of their inputs."""


@dataclass(frozen=True, eq=False)
class SchedulerRule(SequentialRule):
    """The rule `eenet`.

    Args:
        limits: thresholds, [P, K].
        class_weights: u, [P, K, C].
        weights: v, [P, K, K+1]; v of exit k has k + 2 values, followed by zeros.
    """

    name: ClassVar[str] = "eenet"
    per_point: ClassVar[tuple[str, ...]] = ("limits", "class_weights", "weights")

    limits: Floats
    class_weights: Floats
    weights: Floats

    @property
    def exits(self) -> int:
        """The number of exits, K."""
        return int(self.limits.shape[1])

    def decide(self, index: int, logits: np.ndarray, memory: Any) -> tuple[Booleans, Any]:
        """Return which samples leave, [N, P], and the memory, q_0..q_k, [N, P, k+1]; see `SequentialRule.decide`."""
        scores = exit_score(index, logits, self.class_weights[:, index], self.weights[:, index], memory)
        return scores[:, :, -1] >= self.limits[:, index], scores


def exit_score(index: int, logits: np.ndarray, u: Floats, v: Floats, before: Floats | None) -> Floats:
    """Return q_0..q_k of exit k = `index`, [N, P, k+1].

    Args:
        index: the exit.
        logits: its logits, [N, C].
        u: [P, C].
        v: [P, k+2 or more].
        before: q_0..q_{k-1}, [N, P, k]; None at the first exit.
    """
    probability, confidence, certainty = _features(logits, index)
    # Summed term by term: a matrix product may round differently for another number of rows.
    q = np.stack([(probability * each).sum(axis=1) for each in u], axis=1)
    q += confidence[:, None] * v[:, 0] + certainty[:, None] * v[:, 1]
    if before is None:
        first: Floats = np.clip(q, 0, 1)[:, :, None]
        return first
    for place in range(index):
        q += before[:, :, place] * v[:, place + 2]
    return np.concatenate([before, np.clip(q, 0, 1)[:, :, None]], axis=2)


def _features(logits: np.ndarray, index: int) -> tuple[Floats, Floats, Floats]:
    """Return p [N, C], max p [N] and 1 + sum p log p / log C [N] of exit `index`."""
    weights = np.exp(below_top(logits, index + 1))
    confidence, _ = exit_scores(logits, "confidence", exit=index + 1)
    certainty, _ = exit_scores(logits, "entropy", exit=index + 1)
    return weights / weights.sum(axis=1, keepdims=True), confidence, certainty


class Parameters(NamedTuple):
    """Parameters of the scores and shares at one budget; inputs that an exit does not have are 0 in x."""

    u: Tensor
    """[K, C]"""
    v: Tensor
    """[K, K+1]"""
    hidden: Tensor
    """A, [K, C+K+1, H]"""
    hidden_constant: Tensor
    """[K, 1, H]"""
    output: Tensor
    """b, [K, H, 1]"""
    output_constant: Tensor
    """[K, 1, 1]"""

    @classmethod
    def initial(cls, exits: int, classes: int, generator: torch.Generator) -> Parameters:
        """Return parameters with q_k = max p_k and random shares, as linear layers are initialised."""
        inputs = classes + exits + 1
        width = max(int(WIDTH * inputs), 1)

        def uniform(*shape: int, fan_in: int) -> Tensor:
            values: Tensor = (torch.rand(*shape, generator=generator) * 2 - 1) / fan_in**0.5
            return values

        v = torch.zeros(exits, exits + 1)
        v[:, 0] = 1
        return cls(
            torch.zeros(exits, classes),
            v,
            uniform(exits, inputs, width, fan_in=inputs),
            uniform(exits, 1, width, fan_in=inputs),
            uniform(exits, width, 1, fan_in=width),
            uniform(exits, 1, 1, fan_in=width),
        )

    def scores(self, x: Tensor) -> Tensor:
        """Return q, [N, K], from the inputs without scores, x [K, N, C+2]."""
        own = torch.bmm(x, torch.cat([self.u, self.v[:, :2]], dim=1)[:, :, None])[:, :, 0]
        q = [own[0].clamp(0, 1)]
        for k in range(1, len(own)):
            q.append((own[k] + torch.stack(q, dim=1).detach() @ self.v[k, 2 : k + 2]).clamp(0, 1))
        return torch.stack(q, dim=1)

    def shares(self, x: Tensor, q: Tensor) -> Tensor:
        """Return r, [N, K], from x [K, N, C+2] and the detached scores q [N, K]."""
        exits = len(x)
        earlier = torch.ones(exits, exits).tril(-1)[:, None, :-1]  # [K, 1, K-1]: whether exit j < k
        inputs = torch.cat([x, q[:, :-1] * earlier], dim=2)
        hidden = torch.baddbmm(self.hidden_constant, inputs, self.hidden).sigmoid()
        logits: Tensor = torch.baddbmm(self.output_constant, hidden, self.output)[:, :, 0].T
        return logits.softmax(dim=1)


def score_loss(q: Tensor, correct: Tensor, shares: Tensor) -> Tensor:
    """Return the loss of the scores q [N, K], from correct [N, K], 0 or 1, and the detached shares r [N, K]."""
    weight = shares / shares.sum(dim=0)
    return binary_cross_entropy(q.clamp(1e-6, 1 - 1e-6), correct, weight, reduction="sum") / q.shape[1]


def budget_loss(shares: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Return |mean_i sum_k r_ik C_k - B| / B from shares r [N, K] and costs [K]."""
    return ((shares @ costs).mean() - budget).abs() / budget


def share_loss(shares: Tensor, q: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Return the loss of the shares r [N, K], from the detached scores q [N, K] and the costs [K]."""
    # Scores that are all 0 make a uniform target.
    target = q.clamp(min=1e-6) / q.clamp(min=1e-6).sum(dim=1, keepdim=True)
    divergence = (target * (target.log() - shares.log())).sum(dim=1).mean()
    return KL_WEIGHT * divergence + COST_WEIGHT * budget_loss(shares, costs, budget)


def shares_at_budget(shares: ArrayLike, costs: ArrayLike, budget: float) -> Floats:
    """Return r_ik e^(s C_k / C_{K-1}) / normaliser, [N, K], with s such that the planned cost is the budget.

    Args:
        shares: r, [N, K], positive.
        costs: C, [K].
        budget: between C_0 and C_{K-1}, both excluded; with equal costs the shares do not change.
    """
    r, cost = np.asarray(shares, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    logs, relative = np.log(r), cost / cost[-1]
    if cost[0] == cost[-1]:
        return r

    def shifted(s: float) -> Floats:
        z = logs + s * relative
        weights = np.exp(z - z.max(axis=1, keepdims=True))
        result: Floats = weights / weights.sum(axis=1, keepdims=True)
        return result

    # The planned cost grows with s, from C_0 to C_{K-1}.
    low, high = -1.0, 1.0
    while (shifted(low) @ cost).mean() > budget:
        low *= 2
    while (shifted(high) @ cost).mean() < budget:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (shifted(middle) @ cost).mean() < budget else (low, middle)
    return shifted((low + high) / 2)


def share_counts(shares: Floats) -> Integers:
    """Return floor(N mean_i r_ik) of exits 0..K-2, [K-1], from r [N, K]."""
    # A product of N that rounding has put just below a whole number counts as that number.
    counts: Integers = np.floor(shares[:, :-1].sum(axis=0) + 1e-9).astype(np.int64)
    return counts


def train(
    start: Parameters, x: Tensor, correct: Tensor, costs: Tensor, budget: float, turns: int, generator: torch.Generator
) -> Parameters:
    """Return the parameters at one budget.

    Args:
        start: parameters to start from; they are not changed.
        x: inputs without scores, [K, N, C+2].
        correct: whether each exit is right, 0 or 1, [N, K].
        costs: [K].
        budget: B, in the unit of the costs.
        turns: number of turns of the scores and of the shares, of `STEPS` steps each.
        generator: of the batches.
    """
    parameters = Parameters(*(parameter.clone().requires_grad_() for parameter in start))
    of_scores = torch.optim.Adam(parameters[:2], lr=RATE, weight_decay=DECAY)
    of_shares = torch.optim.Adam(parameters[2:], lr=RATE, weight_decay=DECAY)
    for step in range(2 * turns * STEPS):
        rows = torch.randint(len(correct), (min(BATCH, len(correct)),), generator=generator)
        inputs = x[:, rows]
        if step // STEPS % 2 == 0:
            q = parameters.scores(inputs)
            with torch.no_grad():
                shares = parameters.shares(inputs, q)
            loss, optimizer = score_loss(q, correct[rows], shares), of_scores
        else:
            with torch.no_grad():
                q = parameters.scores(inputs)
            loss, optimizer = share_loss(parameters.shares(inputs, q), q, costs, budget), of_shares
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Parameters(*(parameter.detach() for parameter in parameters))


def fit(validation: Validation, score: str = "confidence", seed: int = 0) -> SchedulerRule:
    """Return the rule; see `rules.fit_rule`.

    Args:
        validation: the outputs.
        score: must be "confidence"; the scores are learned.
        seed: seed of the initial shares and of the batches.

    Raises:
        UserError: a logit is not finite.
    """
    logits, _, costs = validation
    samples, exits, classes = logits.shape
    x = torch.empty(exits, samples, classes + 2)
    for k in range(exits):
        probability, confidence, certainty = _features(logits[:, k], k)
        x[k] = torch.from_numpy(np.column_stack([probability, confidence, certainty]))
    correct = torch.from_numpy(validation.correct()).float()
    relative = costs / costs[-1]
    budgets = relative[0] + (1 - relative[0]) * np.arange(1, BUDGETS + 1) / (BUDGETS + 1)
    limits = np.empty((BUDGETS, exits))
    u, v = np.zeros((BUDGETS, exits, classes)), np.zeros((BUDGETS, exits, exits + 1))
    generator = torch.Generator().manual_seed(seed)
    parameters = Parameters.initial(exits, classes, generator)
    in_torch = torch.from_numpy(relative).float()
    for point, budget in enumerate(budgets.tolist()):
        turns = LATER_TURNS if point else TURNS
        parameters = train(parameters, x, correct, in_torch, budget, turns, generator)
        u[point], v[point] = parameters.u.double().numpy(), parameters.v.double().numpy()
        with torch.no_grad():
            shares = parameters.shares(x, parameters.scores(x)).double().numpy()
        before = None
        for k in range(exits):
            before = exit_score(k, logits[:, k], u[point : point + 1, k], v[point : point + 1, k], before)
        assert before is not None  # there is at least one exit
        counts = share_counts(shares_at_budget(shares, relative, budget))
        limits[point] = thresholds(before[:, 0], counts[None])[0]
    return SchedulerRule(limits, u, v)
