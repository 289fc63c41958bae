"""The rule `stopping`: optimal stopping by regression, with the price of a unit of cost as the operating point.

Paper, of the method (pricing American options; its use for exits is ours): Longstaff and Schwartz, "Valuing American
options by simulation: a simple least-squares approach", Review of Financial Studies 2001
(https://doi.org/10.1093/rfs/14.1.113). A sample that leaves at exit k earns p_k - price C_k, where p_k is the
probability that exit k is right. Backward over the exits, on the validation samples:

    p_k    = isotonic regression of "exit k is right" on its score                        [N]
    V      = p_{K-1} - price C_{K-1}                                                      [N]
    for k = K-2 .. 0:
        beta_k = ridge regression of V on X_k = (1, g_k, g_k^2, g_{k-1}, mean of g_0..g_k)  [5]
        V      = p_k - price C_k where that is at least X_k beta_k, else V                [N]
    leave at the first k with p_k - price C_k >= X_k beta_k, else at K-1

g is the logit of the score, limited to +-12, and g_{-1} = 0. V is made of probabilities instead of 0/1 outcomes, which
have more variance. The ridge of 1 is on standardised columns and does not affect the constant. There are 40 prices, in
descending order, that is in ascending order of cost; to meet a budget, choose the price whose cost *on samples that
are not in the fit* is within it: accuracy and cost on the samples of the fit are optimistic.

Shapes: N samples, K exits, C classes, P prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from exitkit.errors import UserError
from exitkit.inference.outputs import ExitView
from exitkit.inference.rules.base import Booleans, SequentialRule, Validation
from exitkit.inference.rules.reward import isotonic, prices
from exitkit.inference.thresholds import Floats

RIDGE = 1.0
HIGHEST = 12.0
"""The largest absolute value of the logit of a score."""


@dataclass(frozen=True, eq=False)
class StoppingRule(SequentialRule):
    """The rule `stopping`.

    Args:
        score: confidence, margin or entropy.
        prices: [P].
        costs: cumulative cost of each exit, [K].
        coefficients: beta of exits 0..K-2, [P, K-1, 5].
        knots: per exit, the knots of the isotonic regression.
        values: per exit, its values at the knots.
    """

    name: ClassVar[str] = "stopping"
    per_point: ClassVar[tuple[str, ...]] = ("prices", "coefficients")

    score: str
    prices: Floats
    costs: Floats
    coefficients: Floats
    knots: tuple[Floats, ...]
    values: tuple[Floats, ...]

    @property
    def exits(self) -> int:
        """The number of exits, K."""
        return len(self.costs)

    def decide(self, view: ExitView, memory: Any) -> tuple[Booleans, Any]:
        """Return which samples leave, [N, P], and the memory (g_k, g_0 + .. + g_k); see `SequentialRule.decide`."""
        score, index = view.score(self.score), view.index
        right = np.interp(score, self.knots[index], self.values[index])
        columns, memory = _columns(index, score_logit(score), memory)
        reward = right[:, None] - self.prices * self.costs[index]
        return reward >= _expected(columns, self.coefficients[:, index]), memory


def score_logit(score: ArrayLike) -> Floats:
    """Return log(s / (1 - s)) of scores s in 0..1, limited to +-12."""
    s = np.asarray(score, dtype=np.float64)
    with np.errstate(divide="ignore"):
        result: Floats = np.clip(np.log(s) - np.log1p(-s), -HIGHEST, HIGHEST)
    return result


def _columns(index: int, g: Floats, memory: tuple[Floats, Floats] | None) -> tuple[list[Floats], tuple[Floats, Floats]]:
    """Return the columns of X_k without the constant, and the memory, from g_k [N] and the memory of exit k - 1."""
    before, total = (np.zeros_like(g), np.zeros_like(g)) if memory is None else memory
    total = total + g
    return [g, g**2, before, total / (index + 1)], (g, total)


def _expected(columns: Sequence[Floats], coefficients: Floats) -> Floats:
    """Return X beta, [N, P], from the columns of X without the constant, each [N], and beta [P, columns + 1]."""
    # Summed column by column: a matrix product may round differently for another number of rows.
    result = coefficients[None, :, 0]
    for place, column in enumerate(columns, 1):
        result = result + column[:, None] * coefficients[:, place]
    return result


def regression(columns: Sequence[Floats], targets: Floats, ridge: float = RIDGE) -> Floats:
    """Return the coefficients of ridge regressions, [P, columns + 1], the constant first.

    Args:
        columns: each [N]; standardised inside. A constant column gets the coefficient 0.
        targets: [N, P].
        ridge: the penalty on the squared coefficients of the standardised columns; the constant has none.
    """
    constant: Floats = targets.mean(axis=0)
    if not columns:
        result: Floats = constant[:, None]
        return result
    x = np.stack(columns, axis=1)
    centre, scale = x.mean(axis=0), x.std(axis=0)
    # Rounding may give a constant column a tiny spread.
    varies = scale > 1e-12 * np.maximum(np.abs(centre), 1)
    z = np.where(varies, (x - centre) / np.where(varies, scale, 1), 0)
    slopes = np.linalg.solve(z.T @ z + ridge * np.eye(len(columns)), z.T @ (targets - constant))
    slopes /= np.where(varies, scale, 1)[:, None]
    result = np.concatenate([(constant - centre @ slopes)[None], slopes]).T
    return result


def backward(columns: Sequence[Sequence[Floats]], right: Floats, costs: Floats, price: Floats) -> Floats:
    """Return the coefficients beta of exits 0..K-2, [P, K-1, columns + 1].

    Args:
        columns: per exit, the columns of X_k without the constant, each [N].
        right: p, [N, K].
        costs: [K].
        price: [P].
    """
    exits = right.shape[1]
    result = []
    value = right[:, -1, None] - price * costs[-1]
    for k in range(exits - 2, -1, -1):
        beta = regression(columns[k], value)
        reward = right[:, k, None] - price * costs[k]
        value = np.where(reward >= _expected(columns[k], beta), reward, value)
        result.append(beta)
    width = len(columns[0]) + 1 if exits > 1 else 1
    return np.stack(result[::-1], axis=1) if result else np.empty((len(price), 0, width))


def fit(validation: Validation, score: str = "confidence") -> StoppingRule:
    """Return the rule; see `rules.fit_rule`.

    Raises:
        UserError: the score is unknown or patience, or a logit is not finite.
    """
    if score == "patience":
        raise UserError("patience is not a number in 0..1; expected the score confidence, margin or entropy")
    values, hits = validation.outputs.scores(score), validation.correct()
    curves = [isotonic(values[:, k], hits[:, k]) for k in range(values.shape[1])]
    right = np.stack([np.interp(values[:, k], *curve) for k, curve in enumerate(curves)], axis=1)
    columns, memory = [], None
    for k, g in enumerate(score_logit(values).T[:-1]):
        part, memory = _columns(k, g, memory)
        columns.append(part)
    price = prices(hits, validation.costs)
    knots, heights = zip(*curves, strict=True)
    coefficients = backward(columns, right, validation.costs, price)
    return StoppingRule(score, price, validation.costs, coefficients, knots, heights)
