"""Operating points: the oracle bound, and the choice on validation accuracy.

An operating point is a mean cost and an accuracy, as `thresholds.budgeted` returns them. The oracle uses the labels
and bounds every exit rule; `held`, `most_accurate_within` and `stitched` choose on validation accuracy.
`exitkit.inference.risk` chooses with a guarantee.

Shapes: N samples, K exits, P operating points of one network, M of several together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from exitkit.errors import UserError
from exitkit.inference.thresholds import Floats, Integers


def oracle_curve(correct: ArrayLike, costs: ArrayLike) -> tuple[Floats, Floats]:
    """Return the mean cost [K] and the accuracy [K] of the best possible exit rule, at K operating points.

    At point j, a sample that one of the exits 1..j (or a later one of equal cost) gets right leaves at the first such
    exit, and any other sample at exit 1. All samples count equally, and a sample's additional cost is C_first - C_1,
    so that adding samples in ascending order of cost is optimal: no exits of at most this mean cost are more accurate.

    Args:
        correct: whether each exit is right, [N, K], see `thresholds.correct`.
        costs: cumulative cost of leaving at each exit, [K], not decreasing.

    Raises:
        UserError: the costs decrease somewhere, or there are no samples.
    """
    hits, cost = np.asarray(correct, dtype=bool), np.asarray(costs, dtype=np.float64)
    if (np.diff(cost) < 0).any():
        raise UserError(f"costs {cost.tolist()} decrease; expected the cumulative cost of each exit")
    if not len(hits):
        raise UserError("no samples; an oracle needs at least one")
    # Samples that exit j is the first to get right: those that an exit up to j gets right, minus those up to j - 1.
    solved = np.logical_or.accumulate(hits, axis=1).sum(axis=0)
    first = np.diff(solved, prepend=0)
    extra = np.cumsum(first * (cost - cost[0]))
    reach = np.searchsorted(cost, cost, side="right") - 1
    return cost[0] + extra[reach] / len(hits), solved[reach] / len(hits)


def held(validation_accuracy: ArrayLike) -> Integers:
    """Return the operating point to use in place of each, [P]: the last improvement on validation up to it.

    An improvement is a point whose validation accuracy [P] is strictly above that of all earlier points. The released
    code also keeps the accuracy of the last improvement, but reports it at the cost of the replaced point; here both
    accuracy and cost must be taken at the returned index.
    """
    accuracy = np.asarray(validation_accuracy, dtype=np.float64)
    return np.maximum.accumulate(np.where(_records(accuracy), np.arange(len(accuracy)), 0))


def most_accurate_within(cost: ArrayLike, validation_accuracy: ArrayLike, budgets: ArrayLike) -> Integers:
    """Return, for each budget [B], the most accurate point on validation within it, [B]; else the lowest-cost point.

    Of equally accurate points, the last one within the budget counts, which spends more of it if the points ascend.

    Args:
        cost: mean cost on validation, [P].
        validation_accuracy: [P].
        budgets: [B], in the unit of `cost`.
    """
    spent, accuracy = np.asarray(cost, dtype=np.float64), np.asarray(validation_accuracy, dtype=np.float64)
    order = np.argsort(accuracy, kind="stable")
    within = spent[order] <= np.asarray(budgets, dtype=np.float64)[:, None]
    last = len(order) - 1 - within[:, ::-1].argmax(axis=1)
    return np.where(within.any(axis=1), order[last], spent.argmin()).astype(np.int64)


def stitched(cost: ArrayLike, validation_accuracy: ArrayLike) -> Integers:
    """Return the indices of the operating points that form one curve, out of M, in ascending order of cost.

    A point is kept if its validation accuracy is strictly above that of all points of lower cost; of points of equal
    cost, the most accurate is kept.

    Args:
        cost: [M], of the points of several networks together.
        validation_accuracy: [M].
    """
    accuracy = np.asarray(validation_accuracy, dtype=np.float64)
    order = np.lexsort((-accuracy, np.asarray(cost, dtype=np.float64)))
    kept: Integers = order[_records(accuracy[order])]
    return kept


def _records(values: Floats) -> np.ndarray:
    """Return whether each value is strictly above all before it."""
    before = np.concatenate([[-np.inf], values])[:-1]
    return values > np.maximum.accumulate(before)
