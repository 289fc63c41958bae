"""Scores: the confidence of an exit in a sample, as one number; a sample leaves where it reaches the threshold.

Four scores, of an exit's class probabilities p (softmax of its logits) or of its predicted classes:

- confidence: max p (MSDNet, ICLR 2018, section 5).
- margin: the largest p minus the second largest ("best versus second best", Joshi et al., CVPR 2009).
- entropy: 1 - H(p) / log C, 1 for a certain and 0 for a uniform prediction (BranchyNet, ICPR 2016, compares H).
- patience: the number of consecutive exits, up to this one, with the same predicted class (PABEE, Zhou et al.,
  NeurIPS 2020). The paper counts from 0: its patience t is t + 1 equal predictions, here it is t.

A larger score means a more confident exit, so that `thresholds.thresholds` and `thresholds.leave_at` accept all four.

Shapes: N samples, K exits, C classes. Scores do not depend on labels.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from exitkit.errors import UserError, unknown
from exitkit.inference.thresholds import Floats, Integers

SCORES = ("confidence", "margin", "entropy", "patience")
"""Names of the scores."""


class Agreement(NamedTuple):
    """State of patience between two exits, per sample."""

    predicted: Integers
    """[N]: the predicted class of the exit before."""
    exits: Floats
    """[N]: the number of consecutive exits, up to that one, that predict it."""


def scores(logits: ArrayLike, rule: str, temperatures: ArrayLike | None = None) -> Floats:
    """Return the score of each exit, [N, K] in float64, from logits [N, K, C].

    Args:
        logits: [N, K, C]; -infinity excludes a class.
        rule: one of `SCORES`.
        temperatures: by which the logits of each exit are divided, [K]; see `calibration.fit_temperatures`. They
            change neither the predicted class nor patience.

    Raises:
        UserError: the rule is unknown, a logit is NaN or +infinity, or a temperature is not positive.
    """
    outputs = np.asarray(logits)
    exits = outputs.shape[1]
    divisors = np.ones(exits) if temperatures is None else checked_temperatures(temperatures, exits)
    result = np.empty(outputs.shape[:2])
    before = None
    # One exit at a time: all of ImageNet's validation logits at once in float64 would take gigabytes.
    for k in range(exits):
        result[:, k], before = exit_scores(outputs[:, k], rule, divisors[k], before, exit=k + 1)
    return result


def exit_scores(
    logits: ArrayLike, rule: str, temperature: float = 1.0, before: Agreement | None = None, *, exit: int = 1
) -> tuple[Floats, Agreement | None]:
    """Return the scores at one exit, [N], from its logits [N, C], and the state for the next exit.

    Args:
        logits, rule: see `scores`; the score of a row does not depend on other rows.
        temperature: temperature of this exit.
        before: the state returned for the exit before, without the rows of samples that left.
        exit: number of the exit, from 1, for error messages.

    Raises:
        UserError: see `scores`.
    """
    if rule not in SCORES:
        raise unknown("exit rule", rule, SCORES)
    outputs = np.asarray(logits)
    z = below_top(outputs, exit)
    if rule == "patience":
        agreement = _agreement(outputs, before)
        return agreement.exits, agreement
    if temperature != 1:
        with np.errstate(over="ignore"):
            z /= temperature
    return _OF_ONE_EXIT[rule](z), None


def confidence(logits: ArrayLike) -> Floats:
    """Return each exit's largest softmax probability, [N, K] in float64, from logits [N, K, C].

    Raises:
        UserError: a logit is NaN or +infinity.
    """
    return scores(logits, "confidence")


def patience_thresholds(exits: int) -> Floats:
    """Return the operating points of patience t = 1..K, [K, K]: t at exits 1..K-1 and -inf at the last.

    At the first point all samples leave at the first exit; at the last point all leave at the last exit, since no
    earlier exit can reach t = K.
    """
    limits = np.repeat(np.arange(1.0, exits + 1)[:, None], exits, axis=1)
    limits[:, -1] = -inf
    return limits


def below_top(logits: ArrayLike, exit: int) -> Floats:
    """Return an exit's logits [N, C] minus each sample's largest, in float64; `exit` is its number, for error messages.

    Raises:
        UserError: a logit is NaN or +infinity, or all logits of a sample are -infinity.
    """
    # In C order, so that the order of summation does not depend on the layout of the logits.
    z = np.array(logits, dtype=np.float64, order="C")
    top = z.max(axis=1, keepdims=True)
    if not np.isfinite(top).all():
        raise UserError(f"the logits of exit {exit} are not finite; evaluation needs finite outputs")
    # A difference beyond the float64 range becomes -inf; its probability is 0 in both cases.
    with np.errstate(over="ignore"):
        z -= top
    return z


def checked_temperatures(temperatures: ArrayLike, exits: int) -> Floats:
    """Return temperatures [K] in float64.

    Raises:
        UserError: there is not one per exit, or one is not a positive number.
    """
    try:
        values = np.asarray(temperatures, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"temperatures are {temperatures!r:.80}; expected one number per exit") from None
    if values.shape != (exits,):
        raise UserError(f"temperatures have the shape {values.shape}; expected ({exits},), one per exit")
    if not (np.isfinite(values) & (values > 0)).all():
        raise UserError(f"temperatures are {values.tolist()}; expected positive numbers")
    return values


def _confidence(z: Floats) -> Floats:
    result: Floats = 1 / np.exp(z).sum(axis=1)
    return result


def _margin(z: Floats) -> Floats:
    largest = 1 / np.exp(z).sum(axis=1)
    if z.shape[1] == 1:
        return np.ones_like(largest)
    # p_1 - p_2 = p_1 (1 - exp(z_2)), as the largest z is 0; the difference would lose digits of small margins.
    second = np.partition(z, -2, axis=1)[:, -2]
    result: Floats = -np.expm1(second) * largest
    return result


def _entropy(z: Floats) -> Floats:
    classes = z.shape[1]
    if classes == 1:
        return np.ones(len(z))
    # Rounding may give nearly uniform outputs a score slightly below 0.
    result: Floats = np.maximum(1 - entropy(z) / log(classes), 0)
    return result


def entropy(z: Floats) -> Floats:
    """Return the entropy of softmax(z) in nats, [N], from z [N, C] whose largest value per row is 0."""
    weights = np.exp(z)
    total = weights.sum(axis=1)
    # H = log sum_c e^z_c - sum_c p_c z_c; an excluded class adds 0, not 0 times infinity.
    result: Floats = np.log(total) - (weights * np.where(weights > 0, z, 0)).sum(axis=1) / total
    return result


def probabilities(outputs: np.ndarray, exit: int) -> Floats:
    """Return softmax(outputs) in float64, [N, C], of the outputs of an exit [N, C]; `exit`, from 1, is for errors."""
    weights = np.exp(below_top(outputs, exit))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


_OF_ONE_EXIT: dict[str, Callable[[Floats], Floats]] = {
    "confidence": _confidence,
    "margin": _margin,
    "entropy": _entropy,
}


def _agreement(outputs: np.ndarray, before: Agreement | None) -> Agreement:
    predicted = outputs.argmax(axis=1)
    exits = np.ones(len(predicted))
    if before is not None:
        exits += np.where(predicted == before.predicted, before.exits, 0)
    return Agreement(predicted, exits)
