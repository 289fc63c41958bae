"""Calibration: agreement of the exits' confidence with their accuracy.

Temperature scaling and the expected calibration error (Guo et al., "On calibration of modern neural networks",
ICML 2017, sections 4.2 and 2, equation 3), for every exit and for every operating point, where each sample
counts at the exit where it leaves.

Shapes: N samples, K exits, C classes, P operating points. Temperatures are fitted on validation samples.
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
"""Range of the temperatures; an exit that is right on every sample gets the lowest one."""


def fit_temperatures(logits_val: ArrayLike, labels_val: ArrayLike) -> Floats:
    """Return, for each exit, the temperature that minimises the negative log-likelihood on validation samples, [K].

    The negative log-likelihood is convex in 1 / T, so that it has one minimum in log T, where the search is done.

    Args:
        logits_val: validation logits [N, K, C].
        labels_val: their classes [N], 0..C-1.

    Raises:
        UserError: there are no samples; a label is not a class; a logit is NaN or +infinity, or that of the right
            class is -infinity (the likelihood is then 0 at every temperature).
    """
    # Imported when used: reports without calibration need not load scipy.
    from scipy.optimize import minimize_scalar

    outputs = np.asarray(logits_val)
    labels = checked_labels(labels_val, outputs)
    result = np.empty(outputs.shape[1])
    for k in range(len(result)):
        z = below_top(outputs[:, k], k + 1)
        of_label = z[np.arange(len(z)), labels].mean()
        if of_label == -np.inf:
            raise UserError(f"exit {k + 1} gives a right class probability 0; expected finite logits of all labels")
        scratch = np.empty_like(z)  # 400 MB on ImageNet, so that all steps of the search share it

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
        confidence: predicted probability that each sample is right, [N], 0..1.
        correct: whether each sample is right, [N].
        bins: number of equally wide bins: bin b = 1..bins is ((b - 1) / bins, b / bins], and the first includes 0.

    Raises:
        UserError: there are no samples or no bins, or a confidence is not a probability.
    """
    confidences, hits = np.asarray(confidence, dtype=np.float64), np.asarray(correct)
    return float(_errors(confidences[None], _bin_of(confidences, bins)[None], hits[None], bins)[0])


def exit_calibration(
    logits: ArrayLike, labels: ArrayLike, temperatures: ArrayLike | None = None, bins: int = 15
) -> Floats:
    """Return each exit's expected calibration error, [K].

    Args:
        logits: [N, K, C].
        labels: classes [N], 0..C-1.
        temperatures: by which the logits of each exit are divided, [K]; None: 1 for all exits.
        bins: see `calibration_error`.

    Raises:
        UserError: see `calibration_error` and `scores.scores`.
    """
    outputs = np.asarray(logits)
    hits = hits_of(outputs, checked_labels(labels, outputs)).T
    confidences = scores(outputs, "confidence", temperatures).T
    return _errors(confidences, _bin_of(confidences, bins), hits, bins)


def point_calibration(confidence: ArrayLike, correct: ArrayLike, left: ArrayLike, bins: int = 15) -> Floats:
    """Return the expected calibration error of each operating point, [P], at the exit where each sample leaves.

    Args:
        confidence: predicted probability that each sample is right, [N, K]; the exit rule may use another score.
        correct: whether each exit is right, [N, K]; see `thresholds.correct`.
        left: the exit (0-based) where each sample leaves, [P, N]; see `thresholds.leave_at`.
        bins: see `calibration_error`.

    Raises:
        UserError: see `calibration_error`.
    """
    confidences, hits, at = np.asarray(confidence, dtype=np.float64), np.asarray(correct), np.asarray(left)
    sample = np.arange(len(confidences))
    return _errors(confidences[sample, at], _bin_of(confidences, bins)[sample, at], hits[sample, at], bins)


def _errors(confidences: Floats, bin_of: Integers, correct: NDArray[np.bool_], bins: int) -> Floats:
    """Return the calibration error of each row, [P], all from [P, N]."""
    rows, samples = confidences.shape
    cell = (bin_of + bins * np.arange(rows)[:, None]).ravel()
    # |B| |accuracy - confidence| of a bin is the absolute value of the sum of its samples' differences.
    gap = np.bincount(cell, (correct.astype(np.float64) - confidences).ravel(), minlength=rows * bins)
    result: Floats = np.abs(gap).reshape(rows, bins).sum(axis=1) / samples
    return result


def _bin_of(confidences: Floats, bins: int) -> Integers:
    if bins < 1:
        raise UserError(f"{bins} bins; expected 1 or more")
    if not confidences.size:
        raise UserError("no samples; a calibration error needs at least one")
    if not ((confidences >= 0) & (confidences <= 1)).all():
        raise UserError("confidences outside 0..1; calibration needs probabilities")
    # Compared with the edges b / bins, since confidence * bins rounds 0.07 * 100 up, beyond its edge.
    return np.searchsorted(np.arange(1, bins) / bins, confidences).astype(np.int64)


def checked_labels(labels: ArrayLike, outputs: np.ndarray) -> Integers:
    """Return labels [N] in int64, checked against outputs [N, K, C].

    Raises:
        UserError: there is not one per sample, there are no samples, or a label is not a class.
    """
    samples, _, classes = outputs.shape
    result = np.asarray(labels)
    if result.shape != (samples,):
        raise UserError(f"labels have the shape {result.shape}; expected ({samples},), one per sample")
    if not samples:
        raise UserError("no samples; calibration needs at least one")
    if result.min() < 0 or result.max() >= classes:
        raise UserError(f"labels {result.min()}..{result.max()} for {classes} classes; expected 0..{classes - 1}")
    return result.astype(np.int64)
