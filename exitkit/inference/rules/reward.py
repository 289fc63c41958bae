"""The reward of leaving, r = P(right) - price * cost: its prices, and the probability of being right.

A rule that maximises the mean of r over the samples has the highest accuracy at its own mean cost; one price is one
operating point. The probability of being right is an isotonic regression of correct predictions on an exit's score
(https://en.wikipedia.org/wiki/Isotonic_regression): unlike 0/1 outcomes it has little variance.

Shapes: N samples, K exits, P prices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from exitkit.inference.thresholds import Floats

PRICES = 40
RANGE = 30.0
"""The prices are from 1 / RANGE to RANGE times the mean accuracy that a unit of cost buys."""


def prices(correct: ArrayLike, costs: ArrayLike, points: int = PRICES) -> Floats:
    """Return geometrically spaced prices of a unit of cost, [P], from the highest down.

    Their centre is (accuracy of the last exit - that of the first) / (C_K - C_1). A last exit that is not more accurate
    counts as one sample more accurate, and equal costs as a difference of C_K (a price then has no effect).

    Args:
        correct: whether each exit is right, [N, K].
        costs: cumulative cost of each exit, [K].
        points: number of prices.
    """
    hits, cost = np.asarray(correct, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    gain = max(hits[:, -1].mean() - hits[:, 0].mean(), 1 / len(hits))
    centre = gain / ((cost[-1] - cost[0]) or cost[-1])
    result: Floats = centre * np.geomspace(RANGE, 1 / RANGE, points)
    return result


def isotonic(score: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    """Return the knots and the values of an isotonic regression of correct [N] on score [N], for `np.interp`."""
    # Imported when used: reports on thresholds need not load scikit-learn.
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(y_min=0, y_max=1).fit(np.asarray(score, np.float64), np.asarray(correct, np.float64))
    return fitted.X_thresholds_.astype(np.float64), fitted.y_thresholds_.astype(np.float64)
