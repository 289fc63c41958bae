"""Calibration: is an exit with a confidence of 0.9 right nine times in ten?

Temperature scaling and the expected calibration error (Guo et al., "On calibration of modern neural networks",
ICML 2017, sections 4.2 and 2, equation 3), for every exit and for every operating point, where each sample
counts at the exit where it leaves.

Shapes: N samples, K exits, C classes, P operating points. Temperatures are found on validation samples.
"""

from __future__ import annotations

from math import exp, log

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exitkit.errors import UserError
from exitkit.inference.scores import below_top, scores
from exitkit.inference.thresholds import Floats, Integers
from exitkit.inference.thresholds import correct as hits_of

LOWEST, HIGHEST = 0.05, 20.0
"""The range of temperatures that is searched; an exit that is right on every sample has its best at the lowest."""


def fit_temperatures(logits_val: ArrayLike, labels_val: ArrayLike) -> Floats:
    """Return the temperature of each exit, [K], that minimises its negative log-likelihood on validation samples.

    The likelihood is convex in 1 / T, hence has one valley in log T, where the search is done.

    Args:
        logits_val: validation logits [N, K, C].
        labels_val: their classes [N], 0..C-1.

    Raises:
        UserError: there are no samples; labels are not classes; logits hold a NaN or +infinity, or -infinity for
            the right class (then no temperature has a finite likelihood).
    """
    # Imported when used: reports without calibration need not load scipy.
    from scipy.optimize import minimize_scalar

    outputs = np.asarray(logits_val)
    labels = _checked_labels(labels_val, outputs)
    result = np.empty(outputs.shape[1])
    for k in range(len(result)):
        z = below_top(outputs[:, k], k + 1)
        of_label = z[np.arange(len(z)), labels].mean()
        if of_label == -np.inf:
            raise UserError(f"exit {k + 1} gives a right class probability 0; no temperature can mend that")
        scratch = np.empty_like(z)  # ImageNet's is 400 MB: one for all steps of the search

        def loss(log_t: float, z: Floats = z, of_label: float = of_label, scratch: Floats = scratch) -> float:
            inverse = exp(-log_t)
            with np.errstate(over="ignore"):
                np.multiply(z, inverse, out=scratch)
            np.exp(scratch, out=scratch)
            return float(np.log(scratch.sum(axis=1)).mean() - inverse * of_label)

        best = minimize_scalar(loss, bounds=(log(LOWEST), log(HIGHEST)), method="bounded", options={"xatol": 1e-7})
        result[k] = exp(best.x)
    return result


def calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Return the expected calibration error, 0..1: sum_b |B_b| / N * |accuracy of B_b - mean confidence of B_b|.

    Args:
        confidence: probability of being right that is claimed of each sample, [N], 0..1.
        correct: whether each is right, [N].
        bins: equally wide bins over (0, 1]: bin b = 1..bins holds ((b - 1) / bins, b / bins], the first 0 as well.

    Raises:
        UserError: there are no samples or no bins, or a confidence is no probability.
    """
    claimed, hits = np.asarray(confidence, dtype=np.float64), np.asarray(correct)
    return float(_errors(claimed[None], _bin_of(claimed, bins)[None], hits[None], bins)[0])


def exit_calibration(
    logits: ArrayLike, labels: ArrayLike, temperatures: ArrayLike | None = None, bins: int = 15
) -> Floats:
    """Return each exit's expected calibration error, [K].

    Args:
        logits: [N, K, C].
        labels: classes [N], 0..C-1.
        temperatures: divide each exit's logits first, [K].
        bins: see `calibration_error`.

    Raises:
        UserError: as `calibration_error` and `scores.scores`.
    """
    outputs = np.asarray(logits)
    hits = hits_of(outputs, _checked_labels(labels, outputs)).T
    claimed = scores(outputs, "confidence", temperatures).T
    return _errors(claimed, _bin_of(claimed, bins), hits, bins)


def point_calibration(confidence: ArrayLike, correct: ArrayLike, left: ArrayLike, bins: int = 15) -> Floats:
    """Return the expected calibration error of each operating point, [P], each sample judged where it leaves.

    Args:
        confidence: probabilities of being right that are claimed, [N, K], whatever rule decides who leaves.
        correct: [N, K], see `thresholds.correct`.
        left: the exit (0-based) where each sample leaves, [P, N], see `thresholds.leave_at`.
        bins: see `calibration_error`.

    Raises:
        UserError: as `calibration_error`.
    """
    claimed, hits, at = np.asarray(confidence, dtype=np.float64), np.asarray(correct), np.asarray(left)
    sample = np.arange(len(claimed))
    return _errors(claimed[sample, at], _bin_of(claimed, bins)[sample, at], hits[sample, at], bins)


def _errors(claimed: Floats, bin_of: Integers, correct: NDArray[np.bool_], bins: int) -> Floats:
    """Return the calibration error of each row, [P], all from [P, N]."""
    rows, samples = claimed.shape
    cell = (bin_of + bins * np.arange(rows)[:, None]).ravel()
    # |B| |accuracy - confidence| of a bin is the size of the sum of its samples' differences.
    gap = np.bincount(cell, (correct.astype(np.float64) - claimed).ravel(), minlength=rows * bins)
    result: Floats = np.abs(gap).reshape(rows, bins).sum(axis=1) / samples
    return result


def _bin_of(claimed: Floats, bins: int) -> Integers:
    if bins < 1:
        raise UserError(f"{bins} bins; expected 1 or more")
    if not claimed.size:
        raise UserError("no samples; a calibration error needs at least one")
    if not ((claimed >= 0) & (claimed <= 1)).all():
        raise UserError("confidences outside 0..1; calibration needs probabilities")
    # Compared with the edges b / bins themselves: confidence * bins would round 0.07 * 100 up, past its edge.
    return np.searchsorted(np.arange(1, bins) / bins, claimed).astype(np.int64)


def _checked_labels(labels: ArrayLike, outputs: np.ndarray) -> Integers:
    samples, _, classes = outputs.shape
    result = np.asarray(labels)
    if result.shape != (samples,):
        raise UserError(f"labels of shape {result.shape} for {samples} samples; expected one for each")
    if not samples:
        raise UserError("no samples; calibration needs at least one")
    if result.min() < 0 or result.max() >= classes:
        raise UserError(f"labels {result.min()}..{result.max()} for {classes} classes; expected 0..{classes - 1}")
    return result.astype(np.int64)
