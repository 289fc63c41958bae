"""Operating points: the best that any could be, which to keep, and which one can be promised.

An operating point is a mean cost and an accuracy, as `thresholds.budgeted` returns them. The oracle knows the
labels and bounds every exit rule; `held` and `stitched` choose on validation accuracy; `risk_controlled` chooses
with a guarantee: Learn then Test (Angelopoulos et al., 2021) by fixed-sequence testing, whose p-values come from
betting (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 2024).

Shapes: N samples, K exits, P operating points of one network, M of several together.
"""

from __future__ import annotations

from math import log

import numpy as np
from numpy.typing import ArrayLike

from exitkit.errors import UserError
from exitkit.inference.thresholds import Floats, Integers

BOLDEST = 0.75
"""c, the largest share of the capital that one sample may lose: the paper takes 1/2 or 3/4."""


def oracle_curve(correct: ArrayLike, costs: ArrayLike) -> tuple[Floats, Floats]:
    """Return mean cost [K] and accuracy [K] of the best that any exit rule could do, at K operating points.

    Point j lets every sample that one of the exits 1..j (or a later one at j's cost) gets right leave at the first
    such exit, and the rest at exit 1. As each sample is worth the same and its price is C_first - C_1, taking the
    cheapest first is optimal: no choice of exits that costs no more is more accurate.

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
    # Samples that exit j is the first to get right: those that some exit up to j does, less those that one before did.
    solved = np.logical_or.accumulate(hits, axis=1).sum(axis=0)
    first = np.diff(solved, prepend=0)
    extra = np.cumsum(first * (cost - cost[0]))
    reach = np.searchsorted(cost, cost, side="right") - 1
    return cost[0] + extra[reach] / len(hits), solved[reach] / len(hits)


def held(validation_accuracy: ArrayLike) -> Integers:
    """Return which operating point to use for each, [P]: the last up to it that brought something on validation.

    For each point, that is the last one up to it whose validation accuracy [P] is strictly above all before. The
    released code does not move on to a point that brings nothing either, but it reports the held accuracy at the
    cost of the point passed over; here accuracy and cost are both to be taken at the index returned.
    """
    accuracy = np.asarray(validation_accuracy, dtype=np.float64)
    return np.maximum.accumulate(np.where(_records(accuracy), np.arange(len(accuracy)), 0))


def most_accurate_within(cost: ArrayLike, validation_accuracy: ArrayLike, budgets: ArrayLike) -> Integers:
    """Return for each budget [B] the most accurate point on validation that costs no more, [B]; else the cheapest.

    Args:
        cost: [P], on validation.
        validation_accuracy: [P].
        budgets: [B], in the unit of `cost`.
    """
    spent, accuracy = np.asarray(cost, dtype=np.float64), np.asarray(validation_accuracy, dtype=np.float64)
    order = np.argsort(accuracy, kind="stable")
    within = spent[order] <= np.asarray(budgets, dtype=np.float64)[:, None]
    last = len(order) - 1 - within[:, ::-1].argmax(axis=1)
    return np.where(within.any(axis=1), order[last], spent.argmin()).astype(np.int64)


def stitched(cost: ArrayLike, validation_accuracy: ArrayLike) -> Integers:
    """Return which of M operating points make one curve, cheapest first: indices into `cost` and `validation_accuracy`.

    Kept are the points whose validation accuracy is strictly above that of all cheaper ones; of points that cost
    the same, the most accurate.

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


def betting_p_values(drops: ArrayLike, limit: float, delta: float = 0.1) -> Floats:
    """Return the p-value of "the mean drop is `limit` or more" for each row, [P], from drops [P, N] in -1..1.

    A gambler bets that drops are below the limit. With X = (drop + 1) / 2 and m = (limit + 1) / 2, the capital
    after n samples is prod_t (1 + lambda_t (m - X_t)). Under the null its mean never grows, so that it ever
    reaches 1 / p with probability p at most (Ville): p is 1 over the most it came to. The stakes are the paper's
    predictable plug-in, lambda_t = min(sqrt(2 log(1 / delta) / (N v_{t-1})), c / (1 - m)), where the variance
    v_{t-1} is that of the samples before t and of one made-up sample of mean 1/2 and variance 1/4. As
    lambda_t (1 - m) <= c < 1, no sample takes all.

    A row's drops are to be independent draws *in the order given*: samples that lie sorted, by class say, must be
    shuffled first.

    Args:
        drops: [P, N].
        limit: -1..1.
        delta: the level that the stakes are made for; any other may be tested, with less power.

    Raises:
        UserError: the limit or a drop lies outside -1..1, or delta outside (0, 1).
    """
    _check_share("delta", delta)
    if not -1 <= limit <= 1:
        raise UserError(f"the limit of the drop is {limit}; expected -1..1")
    x = (np.asarray(drops, dtype=np.float64) + 1) / 2
    if not ((x >= 0) & (x <= 1)).all():
        raise UserError("drops outside -1..1; expected differences of two accuracies")
    m, samples = (limit + 1) / 2, x.shape[1]
    seen = np.arange(2, samples + 2)
    mean = (0.5 + np.cumsum(x, axis=1)) / seen
    variance = (0.25 + np.cumsum((x - mean) ** 2, axis=1)) / seen
    # A stake may only know the samples before its own.
    variance = np.concatenate([np.full((len(x), 1), 0.25), variance[:, :-1]], axis=1)[:, :samples]
    boldest = BOLDEST / (1 - m) if m < 1 else np.inf
    stakes = np.minimum(np.sqrt(2 * log(1 / delta) / (max(samples, 1) * variance)), boldest)
    # In logarithms, as the capital may leave the float64 range; before the first sample it is 1.
    capital = np.cumsum(np.log1p(stakes * (m - x)), axis=1)
    p: Floats = np.exp(-capital.max(axis=1, initial=0.0))
    return p


def risk_controlled(
    correct_full: ArrayLike, correct_leaving: ArrayLike, cost: ArrayLike, epsilon: float, delta: float, seed: int = 0
) -> int | None:
    """Return the cheapest operating point that loses less than epsilon of the full network's accuracy, or None.

    With probability 1 - delta over the samples, the true accuracy at the point returned is below the full
    network's by less than epsilon. Points are tested from the dearest down, each at level delta, until the first
    that can't be shown to lose less; one error in such a sequence costs delta in all, however many points there
    are. None: not even the dearest passes.

    The operating points (their thresholds, and the costs that order them) must have been fixed on *other* samples
    than these; on the same ones nothing is guaranteed.

    Args:
        correct_full: whether the full network is right, [N].
        correct_leaving: whether each sample is right at the exit where it leaves, [P, N].
        cost: [P], planned or measured on other samples.
        epsilon: the accuracy that may be lost, in (0, 1].
        delta: the probability of a wrong choice that is accepted, in (0, 1).
        seed: of the order in which samples are looked at; data sets often lie sorted by class, and sorted samples
            are no independent draws.

    Raises:
        UserError: epsilon or delta is outside its range.
    """
    if not 0 < epsilon <= 1:
        raise UserError(f"epsilon is {epsilon}; expected an accuracy above 0 and up to 1")
    _check_share("delta", delta)
    drops = np.asarray(correct_full, dtype=np.float64) - np.asarray(correct_leaving, dtype=np.float64)
    shuffled = drops[:, np.random.default_rng(seed).permutation(drops.shape[1])]
    order = np.argsort(-np.asarray(cost, dtype=np.float64), kind="stable")
    passes = betting_p_values(shuffled, epsilon, delta)[order] <= delta
    passed = int(np.logical_and.accumulate(passes).sum())
    return int(order[passed - 1]) if passed else None


def _check_share(what: str, value: float) -> None:
    if not 0 < value < 1:
        raise UserError(f"{what} is {value}; expected a probability between 0 and 1, both excluded")
