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
  scores and 120 for the shares (20 each at later budgets), of rate 3e-3, in turns of ten. The code trains ten times at
  each budget, for 1,000 epochs of rate 3e-5, in turns of ten epochs; that takes hours on one core. Batch size 512,
  weight decay 1e-2, alpha_1 = 1e-3 and alpha_2 = 1e-2 are those of the code.
- There are half as many hidden units as inputs of the last exit, at every exit; the code takes half of the exit's own.

Shapes: N samples, K exits, C classes, P budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from exitkit.inference.outputs import ExitView
from exitkit.inference.rules.base import Booleans, SequentialRule, Validation
from exitkit.inference.thresholds import Floats, Integers, thresholds

BUDGETS = 12
TURNS, LATER_TURNS, STEPS, BATCH = 12, 2, 10, 512
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

    def decide(self, view: ExitView, memory: Any) -> tuple[Booleans, Any]:
        """Return which samples leave, [N, P], and the memory, q_0..q_k, [N, P, k+1]; see `SequentialRule.decide`."""
        scores = exit_score(features(view), self.class_weights[:, view.index], self.weights[:, view.index], memory)
        return scores[:, :, -1] >= self.limits[:, view.index], scores


class Features(NamedTuple):
    """What a score reads of an exit besides earlier scores."""

    probability: Floats
    """p, [N, C]"""
    confidence: Floats
    """max p, [N]"""
    certainty: Floats
    """1 + sum p log p / log C, [N]"""


def features(view: ExitView) -> Features:
    """Return the features of an exit."""
    return Features(view.probability(), view.score("confidence"), view.score("entropy"))


def exit_score(of_exit: Features, u: Floats, v: Floats, before: Floats | None) -> Floats:
    """Return q_0..q_k of exit k, [N, P, k+1].

    Args:
        of_exit: features of the exit.
        u: [P, C].
        v: [P, k+2 or more].
        before: q_0..q_{k-1}, [N, P, k]; None at the first exit.
    """
    probability, confidence, certainty = of_exit
    # Summed term by term: a matrix product may round differently for another number of rows.
    q = np.stack([(probability * each).sum(axis=1) for each in u], axis=1)
    q += confidence[:, None] * v[:, 0] + certainty[:, None] * v[:, 1]
    if before is None:
        first: Floats = np.clip(q, 0, 1)[:, :, None]
        return first
    for place in range(before.shape[2]):
        q += before[:, :, place] * v[:, place + 2]
    return np.concatenate([before, np.clip(q, 0, 1)[:, :, None]], axis=2)


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
        """Return q, [K, N], from the inputs without scores, x [K, N, C+2]."""
        q = torch.bmm(x, torch.cat([self.u, self.v[:, :2]], dim=1)[:, :, None])[:, :, 0]
        q[0].clamp_(0, 1)
        for k in range(1, len(q)):
            torch.addmv(q[k], q[:k].T, self.v[k, 2 : k + 2], out=q[k]).clamp_(0, 1)
        return q

    def hidden_units(self, x: Tensor, q: Tensor) -> Tensor:
        """Return sigmoid(A x), [K, N, H], from x [K, N, C+2] and the scores q [K, N]."""
        hidden = torch.baddbmm(self.hidden_constant, x, self.hidden[:, : x.shape[2]])
        return hidden.baddbmm_(earlier_scores(q), self.hidden[:, x.shape[2] :]).sigmoid_()

    def shares(self, hidden: Tensor) -> Tensor:
        """Return r, [K, N], from the hidden units [K, N, H]."""
        return torch.baddbmm(self.output_constant, hidden, self.output)[:, :, 0].softmax(dim=0)


def earlier_scores(q: Tensor) -> Tensor:
    """Return the scores that each exit reads, [K, N, K-1], from q [K, N]: those of earlier exits, 0 elsewhere."""
    exits = len(q)
    earlier = torch.ones(exits, exits, dtype=q.dtype).tril_(-1)[:, None, :-1]  # [K, 1, K-1]: whether exit j < k
    return q[:-1].T * earlier


def score_gradient(x: Tensor, q: Tensor, correct: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the loss of the scores in u [K, C] and v [K, K+1]; q is clamped to 1e-6 .. 1 - 1e-6.

    Args:
        x: inputs without scores, [K, N, C+2].
        q: scores, [K, N].
        correct: whether each exit is right, 0 or 1, [K, N].
        shares: r, [K, N].
    """
    weight = shares / (shares.sum(dim=1, keepdim=True) * len(q))
    # No gradient passes where q is clamped.
    slope = torch.where((q >= 1e-6) & (q <= 1 - 1e-6), weight * (q - correct) / (q * (1 - q)), 0)
    of_inputs = torch.bmm(slope[:, None], x)[:, 0]
    of_scores = (slope @ q[:-1].T).tril_(-1)
    return of_inputs[:, :-2], torch.cat([of_inputs[:, -2:], of_scores], dim=1)


def share_gradient(
    parameters: Parameters, x: Tensor, q: Tensor, costs: Tensor, budget: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of the loss of the shares in A, its constant, b and its constant.

    Args:
        parameters: the parameters.
        x, q: see `score_gradient`.
        costs: [K].
        budget: B.
    """
    samples = q.shape[1]
    hidden = parameters.hidden_units(x, q)
    r = parameters.shares(hidden)
    # Scores that are all 0 make a uniform target.
    target = q.clamp(min=1e-6)
    target = target / target.sum(dim=0)
    planned = costs @ r  # [N]
    over = torch.sign(planned.mean() - budget) * COST_WEIGHT / budget
    slope = (KL_WEIGHT * (r - target) + over * r * (costs[:, None] - planned)) / samples
    of_hidden = hidden.square().neg_().add_(hidden)  # the derivative of the sigmoid, h (1 - h)
    of_hidden.mul_(slope[:, :, None]).mul_(parameters.output.transpose(1, 2))
    of_inputs = [torch.bmm(part.transpose(1, 2), of_hidden) for part in (x, earlier_scores(q))]
    return (
        torch.cat(of_inputs, dim=1),
        of_hidden.sum(dim=1, keepdim=True),
        torch.bmm(hidden.transpose(1, 2), slope[:, :, None]),
        slope.sum(dim=1)[:, None, None],
    )


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

    # Imported when used: commands that leave nothing early need not load scipy.
    from scipy.optimize import brentq

    def shifted(s: float) -> Floats:
        z = logs + s * relative
        weights = np.exp(z - z.max(axis=1, keepdims=True))
        result: Floats = weights / weights.sum(axis=1, keepdims=True)
        return result

    def over(s: float) -> float:
        return float((shifted(s) @ cost).mean()) / budget - 1

    # The planned cost grows with s, from C_0 to C_{K-1}.
    low, high = -1.0, 1.0
    while over(low) > 0:
        low *= 2
    while over(high) < 0:
        high *= 2
    return shifted(brentq(over, low, high, xtol=1e-13))


def share_counts(shares: Floats) -> Integers:
    """Return floor(N mean_i r_ik) of exits 0..K-2, [K-1], from r [N, K]."""
    # A product of N that rounding has put just below a whole number counts as that number.
    counts: Integers = np.floor(shares[:, :-1].sum(axis=0) + 1e-9).astype(np.int64)
    return counts


class _Adam:
    """Adam with weight decay, as `torch.optim.Adam`, whose first step imports torch's compiler for seconds."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in parameters]
        self.steps = 0

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Change the parameters in place."""
        self.steps += 1
        rate, scale = RATE / (1 - 0.9**self.steps), (1 - 0.999**self.steps) ** 0.5
        for parameter, gradient, (mean, square) in zip(self.parameters, gradients, self.moments, strict=True):
            decayed = gradient + DECAY * parameter
            mean.lerp_(decayed, 0.1)
            square.mul_(0.999).addcmul_(decayed, decayed, value=0.001)
            parameter.addcdiv_(mean, (square.sqrt() / scale).add_(1e-8), value=-rate)


@torch.no_grad()
def train(
    start: Parameters, x: Tensor, correct: Tensor, costs: Tensor, budget: float, turns: int, generator: torch.Generator
) -> Parameters:
    """Return the parameters at one budget.

    Args:
        start: parameters to start from; they are not changed.
        x: inputs without scores, [N, K, C+2].
        correct: whether each exit is right, 0 or 1, [N, K].
        costs: [K].
        budget: B, in the unit of the costs.
        turns: number of turns of the scores and of the shares, of `STEPS` steps each.
        generator: of the batches.
    """
    parameters = Parameters(*(parameter.clone() for parameter in start))
    of_scores, of_shares = _Adam(parameters[:2]), _Adam(parameters[2:])
    samples, first = len(correct), len(correct)
    size = min(BATCH, samples)
    for step in range(2 * turns * STEPS):
        if first + size > samples:
            order = torch.randperm(samples, generator=generator)
            x, correct, first = x[order], correct[order], 0
        rows = slice(first, first + size)
        first += size
        inputs = x[rows].transpose(0, 1)
        q = parameters.scores(inputs)
        if step // STEPS % 2 == 0:
            shares = parameters.shares(parameters.hidden_units(inputs, q))
            of_scores.step(score_gradient(inputs, q, correct[rows].T, shares))
        else:
            of_shares.step(share_gradient(parameters, inputs, q, costs, budget))
    return parameters


@torch.no_grad()
def fit(validation: Validation, *, seed: int = 0) -> SchedulerRule:
    """Return the rule; see `rules.fit_rule`.

    Args:
        validation: the outputs.
        seed: seed of the initial shares and of the batches.

    Raises:
        UserError: a logit is not finite.
    """
    samples, exits, classes = validation.logits.shape
    of_exits = [features(view) for view in validation.outputs.exits]
    x = torch.empty(samples, exits, classes + 2)
    for k, parts in enumerate(of_exits):
        x[:, k] = torch.from_numpy(np.column_stack(parts))
    correct = torch.from_numpy(validation.correct()).float()
    relative = validation.costs / validation.costs[-1]
    budgets = relative[0] + (1 - relative[0]) * np.arange(1, BUDGETS + 1) / (BUDGETS + 1)
    limits = np.empty((BUDGETS, exits))
    u, v = np.zeros((BUDGETS, exits, classes)), np.zeros((BUDGETS, exits, exits + 1))
    generator = torch.Generator().manual_seed(seed)
    parameters = Parameters.initial(exits, classes, generator)
    in_torch, inputs = torch.from_numpy(relative).float(), x.transpose(0, 1)
    for point, budget in enumerate(budgets.tolist()):
        turns = LATER_TURNS if point else TURNS
        parameters = train(parameters, x, correct, in_torch, budget, turns, generator)
        u[point], v[point] = parameters.u.double().numpy(), parameters.v.double().numpy()
        hidden = parameters.hidden_units(inputs, parameters.scores(inputs))
        shares = parameters.shares(hidden).double().numpy().T
        before = None
        for k, parts in enumerate(of_exits):
            before = exit_score(parts, u[point : point + 1, k], v[point : point + 1, k], before)
        assert before is not None  # there is at least one exit
        counts = share_counts(shares_at_budget(shares, relative, budget))
        limits[point] = thresholds(before[:, 0], counts[None])[0]
    return SchedulerRule(limits, u, v)
