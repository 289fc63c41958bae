"""Is a gain more than noise: seed-paired differences, correction for several methods, area under a curve."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_ROUNDING = 1e-9  # percent; one image of a million is 1e-4


class Difference(NamedTuple):
    """A mean difference over n pairs, its t-interval, and the two-sided p-value of there being none.

    Interval and p-value are NaN for a single pair, and where all pairs differ by the same amount: accuracies move in
    steps of one image, so that a few seeds may agree by chance, which says nothing of how far they spread.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int


def paired_difference(ours: ArrayLike, theirs: ArrayLike, confidence: float = 0.95) -> Difference:
    """Compare two methods on the same seeds by Student's t on the differences.

    Args:
        ours, theirs: one value a seed [n], in the same order of seeds.
        confidence: of the interval.
    """
    # Imported when used: scipy takes a second to load.
    from scipy import stats

    change = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    n, mean = len(change), float(change.mean())
    if n < 2:
        return Difference(mean, np.nan, np.nan, np.nan, n)
    if not change.any():
        return Difference(0.0, 0.0, 0.0, 1.0, n)
    if np.allclose(change, mean, rtol=0, atol=_ROUNDING):
        return Difference(mean, np.nan, np.nan, np.nan, n)
    error = float(change.std(ddof=1)) / n**0.5
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return Difference(mean, mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / error, n - 1)), n)


def holm(p: ArrayLike) -> Floats:
    """Return p-values corrected for how many there are (Holm, 1979); NaN stays and does not count."""
    values = np.asarray(p, dtype=np.float64)
    corrected = np.full_like(values, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    return corrected


def area_under_curve(cost: ArrayLike, accuracy: ArrayLike, low: float, high: float) -> float:
    """Return the mean height of a cost-accuracy curve between two costs, by the trapezoid rule.

    Args:
        cost, accuracy: points of the curve [P], in any order; of points of one cost the best counts.
        low, high: the range; NaN is returned where the curve does not reach over it.
    """
    # Imported when used: scipy takes a second to load.
    from scipy.integrate import trapezoid

    costs, heights = np.asarray(cost, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    places, where = np.unique(costs, return_inverse=True)
    best = np.full(len(places), -np.inf)
    np.maximum.at(best, where, heights)
    if not (places[0] <= low < high <= places[-1]):
        return float("nan")
    inside = places[(places > low) & (places < high)]
    x = np.concatenate([[low], inside, [high]])
    return float(trapezoid(np.interp(x, places, best), x) / (high - low))
