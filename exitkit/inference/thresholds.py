"""Anytime and budgeted-batch evaluation: pure functions of stored exit outputs.

Budgeted batch (MSDNet, ICLR 2018, section 5): the validation samples are distributed over the exits in the ratio
pi_k ~ q^k, k = 1..K; each exit's threshold is the confidence at which its share leaves. The thresholds are then
applied to the test samples. One q is one operating point; the papers sweep q = p / 20, p = 1..39.

Shapes: N samples, K exits, C classes, P operating points. Arrays index exits from 0. No function loads a network, and
thresholds depend neither on labels nor on test samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exitkit.errors import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Share = float | Fraction
"""q, the ratio between the shares of neighbouring exits: from 0 (all at the first) to inf (all at the last)."""


def paper_shares(points: int = 39) -> tuple[Share, ...]:
    """Return the papers' operating points, q = p / 20 for p = 1..points.

    39 points are those of MSDNet, RANet, BoostNet and L2W-DEN; IMTA and Meta-GF have 40.
    """
    return tuple(Fraction(p, 20) for p in range(1, points + 1))


PAPER_SHARES = paper_shares()


class Realised(NamedTuple):
    """Accuracy, cost and exit rates of P operating points on N samples."""

    accuracy: Floats
    """[P], 0..1: accuracy at the exits where the samples leave."""
    cost: Floats
    """[P], in the unit of the costs: mean over the samples of the cost of the exit where each leaves."""
    rates: Floats
    """[P, K]: share of the samples that leave at each exit; rows sum to 1."""


def realised(exit_index: ArrayLike, correct: ArrayLike, costs: ArrayLike) -> Realised:
    """Return accuracy, cost and exit rates of operating points.

    Args:
        exit_index: the exit (0-based) where each sample leaves, [P, N]; see `leave_at`.
        correct: whether each exit is right, [N, K]; see `correct`.
        costs: cumulative cost of leaving at each exit, [K], in any unit.
    """
    leaves, hits = np.asarray(exit_index), np.asarray(correct, dtype=bool)
    rates = np.stack([(leaves == k).mean(axis=1) for k in range(hits.shape[1])], axis=1)
    accuracy = hits[np.arange(len(hits)), leaves].mean(axis=1)
    return Realised(accuracy, rates @ np.asarray(costs, dtype=np.float64), rates)


class Budgeted(NamedTuple):
    """Budgeted-batch results at P operating points."""

    accuracy: Floats
    """[P], 0..1: accuracy on the test samples, at the exits where they leave."""
    cost: Floats
    """[P], in the unit of `costs`: mean over the test samples of the cost of the exit where each leaves."""
    rates: Floats
    """[P, K]: share of the test samples that leave at each exit; rows sum to 1."""
    thresholds: Floats
    """[P, K]: a sample leaves at the first exit whose confidence reaches its threshold."""


def correct(logits: ArrayLike, labels: ArrayLike) -> NDArray[np.bool_]:
    """Return whether each exit's top-1 class is right, [N, K], from logits [N, K, C] and labels [N]."""
    hits: NDArray[np.bool_] = np.asarray(logits).argmax(axis=2) == np.asarray(labels)[:, None]
    return hits


def anytime_accuracy(logits: ArrayLike, labels: ArrayLike) -> Floats:
    """Return each exit's top-1 accuracy over all samples, [K], 0..1, from logits [N, K, C] and labels [N]."""
    accuracy: Floats = correct(logits, labels).mean(axis=0)
    return accuracy


def shares(q: ArrayLike, exits: int) -> Floats:
    """Return pi_k = q^k / sum_j q^j for k = 1..`exits`, [P, K], from q [P], 0..inf; exact at both ends."""
    ratio = np.asarray(q, dtype=np.float64).reshape(-1, 1)
    with np.errstate(divide="ignore", over="ignore"):
        # Divided by the largest power, so that nothing overflows.
        base = np.where(ratio <= 1, ratio, 1 / ratio)
    power = np.where(ratio <= 1, np.arange(exits), np.arange(exits)[::-1])
    weights = base**power
    normalised: Floats = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def exit_counts(samples: int, exits: int, q: Iterable[Share] = PAPER_SHARES) -> Integers:
    """Return the number of samples to leave at each exit but the last: floor(N pi_k), [P, K - 1].

    Computed in rational numbers, so that rounding does not change a count; a float q is used at its exact value.
    """
    rows = [_counts(samples, exits, share) for share in q]
    return np.array(rows, dtype=np.int64).reshape(len(rows), exits - 1)


def _counts(samples: int, exits: int, share: Share) -> list[int]:
    if share == inf:
        return [0] * (exits - 1)
    p, d = share.as_integer_ratio()
    weights = [p**k * d ** (exits - 1 - k) for k in range(exits)]
    total = sum(weights)
    return [samples * weight // total for weight in weights[:-1]]


def thresholds(confidence_val: ArrayLike, counts: ArrayLike) -> Floats:
    """Return the thresholds [P, K] that let `counts` [P, K - 1] of the validation samples leave at each exit.

    Exit by exit, T_k is the n-th largest confidence among the samples that have not left, and those with c_k >= T_k
    leave (with ties, possibly more than n). An exit whose n is 0, or larger than the number of remaining samples, is
    closed: its threshold is inf (1e8 in the released code). At the last exit all leave: its threshold is -inf.

    Args:
        confidence_val: validation confidences [N, K].
        counts: samples to leave at exits 1..K-1 of the *whole* set, [P, K - 1]; see `exit_counts`.
    """
    scores, targets = np.asarray(confidence_val, dtype=np.float64), np.asarray(counts)
    points, exits = len(targets), scores.shape[1]
    result = np.full((points, exits), inf)
    result[:, -1] = -inf
    alive = np.ones((points, len(scores)), dtype=bool)
    for k in range(exits - 1):
        column = np.ascontiguousarray(scores[:, k])
        order = np.argsort(-column, kind="stable")
        rank = np.cumsum(alive.take(order, axis=1), axis=1, dtype=np.int32)
        n = targets[:, k, None]
        open_points = (rank[:, -1] >= n[:, 0]) & (n[:, 0] >= 1)
        position = (rank < n).sum(axis=1)
        result[open_points, k] = column[order[position[open_points]]]
        alive &= column < result[:, k, None]
    return result


def leave_at(confidence_test: ArrayLike, limits: ArrayLike) -> Integers:
    """Return the exit (0-based) where each sample leaves, [P, N]: the first with c_k >= T_k, else the last.

    Args:
        confidence_test: confidences [N, K].
        limits: thresholds [P, K].
    """
    scores, limit = np.asarray(confidence_test), np.asarray(limits)
    exit_index = np.zeros((len(limit), len(scores)), dtype=np.int64)
    stays = np.ones(exit_index.shape, dtype=bool)
    for k in range(scores.shape[1] - 1):
        stays &= ~(np.ascontiguousarray(scores[:, k]) >= limit[:, k, None])
        exit_index += stays
    return exit_index


def budgeted(
    validation_confidence: ArrayLike,
    test_confidence: ArrayLike,
    test_correct: ArrayLike,
    costs: ArrayLike,
    counts: ArrayLike,
) -> Budgeted:
    """Find thresholds on validation confidences and apply them to the test set.

    Args:
        validation_confidence: [N_val, K].
        test_confidence: [N_test, K].
        test_correct: [N_test, K], see `correct`.
        costs: cumulative cost of leaving at each exit, [K], in any unit.
        counts: validation samples to leave at exits 1..K-1, [P, K - 1]; see `exit_counts`.
    """
    limits = thresholds(validation_confidence, counts)
    return Budgeted(*realised(leave_at(test_confidence, limits), test_correct, costs), limits)


def planned_cost(q: ArrayLike, costs: ArrayLike) -> Floats:
    """Return the planned mean cost at ratio q, sum_k pi_k(q) C_k, [P], from costs [K]."""
    cost = np.asarray(costs, dtype=np.float64)
    planned: Floats = shares(q, len(cost)) @ cost
    return planned


def share_for_budget(costs: ArrayLike, budgets: ArrayLike) -> Floats:
    """Return the q whose planned mean cost is each budget, [B]: BoostNet's equation 9.

    The planned cost grows with q from C_1 to C_K, and is inverted by bisection on log q. A budget of at most C_1 gives
    q = 0 (all samples leave at the first exit), and one of at least C_K gives inf (all leave at the last). The paper
    writes the shares as (1 - p)^(n-1) and solves for p by Newton's method: up to normalisation, its 1 - p is q, which
    here may exceed 1, for budgets above the mean of the costs.

    Args:
        costs: cumulative cost of each exit, [K], not decreasing.
        budgets: mean costs, [B], in the unit of `costs`.

    Raises:
        UserError: the costs decrease somewhere.
    """
    cost = np.asarray(costs, dtype=np.float64)
    if (np.diff(cost) < 0).any():
        raise UserError(f"costs {cost.tolist()} decrease; expected the cumulative cost of each exit")
    budget = np.asarray(budgets, dtype=np.float64)
    low, high = np.full(budget.shape, -745.0), np.full(budget.shape, 709.0)  # log of the float64 range
    for _ in range(64):
        middle = (low + high) / 2
        short = planned_cost(np.exp(middle), cost) < budget
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    q = np.exp((low + high) / 2)
    q = np.where(budget >= cost[-1], inf, q)
    return np.where(budget <= cost[0], 0.0, q)
