"""Statistics of comparisons: differences paired by seed, Holm's correction, area under a curve, outliers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
SIGNIFICANCE = 0.05
"""Largest p-value of a significant difference."""
_ROUNDING = 1e-9  # tolerance in percentage points; one image of a million is 1e-4


class Difference(NamedTuple):
    """Mean difference over n pairs, its t-interval, and the two-sided p-value of the hypothesis that it is 0.

    Interval and p-value are NaN for a single pair, and if all pairs have the same nonzero difference: accuracies are
    multiples of one image, so that equal differences of a few seeds are no evidence of a zero variance.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int


def paired_difference(values: ArrayLike, baseline: ArrayLike, confidence: float = 0.95) -> Difference:
    """Compare two methods on the same seeds by Student's paired t-test.

    Args:
        values, baseline: one value per seed [n], in the same order of seeds.
        confidence: confidence level of the interval.
    """
    # Imported on use: scipy takes a second to load.
    from scipy import stats

    change = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    n, mean = len(change), float(change.mean())
    if n < 2:
        return Difference(mean, np.nan, np.nan, np.nan, n)
    if not change.any():
        return Difference(0.0, 0.0, 0.0, 1.0, n)
    if np.allclose(change, mean, rtol=0, atol=_ROUNDING):
        return Difference(mean, np.nan, np.nan, np.nan, n)
    error = float(change.std(ddof=1)) / n**0.5
    half_width = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Difference(mean, mean - half_width, mean + half_width, p, n)


def holm(p: ArrayLike) -> Floats:
    """Return p-values [n] corrected for multiple tests (Holm, 1979); NaN stays NaN and is not counted as a test."""
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
        cost, accuracy: points of the curve [P], in any order; of several points with the same cost, the best is used.
        low, high: range of costs; the result is NaN if the curve does not cover it.
    """
    # Imported on use: scipy takes a second to load.
    from scipy.integrate import trapezoid

    costs, heights = np.asarray(cost, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    unique, index = np.unique(costs, return_inverse=True)
    best = np.full(len(unique), -np.inf)
    np.maximum.at(best, index, heights)
    if not (unique[0] <= low < high <= unique[-1]):
        return float("nan")
    inside = unique[(unique > low) & (unique < high)]
    x = np.concatenate([[low], inside, [high]])
    return float(trapezoid(np.interp(x, unique, best), x) / (high - low))


def without_outliers(lows: ArrayLike, highs: ArrayLike) -> tuple[float, float]:
    """Return the limits of an axis for the ranges from `lows` to `highs`, without those far from the others.

    Far: more than three interquartile ranges outside the quartiles, Tukey's outer fences. All ranges are in the limits
    unless the axis would be more than twice as long with them.
    """
    bottoms, tops = (np.atleast_1d(np.asarray(values, dtype=np.float64)) for values in (lows, highs))
    bottoms, tops = bottoms[np.isfinite(bottoms)], tops[np.isfinite(tops)]
    if not len(bottoms) or not len(tops):
        return np.nan, np.nan
    first, third = np.quantile(bottoms, [0.25, 0.75])
    low = float(bottoms[bottoms >= first - 3 * (third - first)].min())
    first, third = np.quantile(tops, [0.25, 0.75])
    high = float(tops[tops <= third + 3 * (third - first)].max())
    whole = float(bottoms.min()), float(tops.max())
    return (low, high) if whole[1] - whole[0] > 2 * (high - low) else whole
