"""Scores: how confident each exit is of each sample, as one number; a sample leaves where it reaches a threshold.

Four scores, of an exit's class probabilities p (softmax of its logits) or of its predicted classes:

- confidence: max p (MSDNet, ICLR 2018, section 5).
- margin: the largest p minus the second largest ("best versus second best", Joshi et al., CVPR 2009).
- entropy: 1 - H(p) / log C, so that 1 is certain and 0 is uniform (BranchyNet, ICPR 2016, thresholds H itself).
- patience: for how many exits in a row, this one included, the predicted class has been the same (PABEE, Zhou et
  al., NeurIPS 2020). The paper's counter starts at 0: its patience t asks for t + 1 exits that agree, ours for t.

A larger score is a more confident exit, so that `thresholds.thresholds` and `thresholds.leave_at` take all four.

Shapes: N samples, K exits, C classes. Nothing here reads a label.
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
"""The names of the scores."""


class Agreement(NamedTuple):
    """What patience keeps per sample from one exit to the next."""

    predicted: Integers
    """[N]: the class that the exit before predicted."""
    exits: Floats
    """[N]: how many exits in a row, up to that one, predicted it."""


def scores(logits: ArrayLike, rule: str, temperatures: ArrayLike | None = None) -> Floats:
    """Return the score of each exit, [N, K] in float64, from logits [N, K, C].

    Args:
        logits: [N, K, C]; -infinity rules a class out.
        rule: one of `SCORES`.
        temperatures: divide each exit's logits first, [K]; see `calibration.fit_temperatures`. The predicted
            class, and with it patience, does not change.

    Raises:
        UserError: there is no such rule, a sample's logits hold a NaN or +infinity, or a temperature is not
            positive.
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
    """Return the score of one exit, [N], from its logits [N, C], and what the score of the next exit needs.

    Args:
        logits, rule: see `scores`; a row's score does not depend on which other rows there are.
        temperature: of this exit.
        before: what this function returned for the exit before, with the rows of samples that left dropped.
        exit: number of the exit, from 1, for messages.

    Raises:
        UserError: as `scores`.
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
        UserError: a sample's logits hold a NaN or +infinity.
    """
    return scores(logits, "confidence")


def patience_thresholds(exits: int) -> Floats:
    """Return the operating points of patience t = 1..K, [K, K]: t at exits 1..K-1 and -inf at the last.

    The first lets all leave at the first exit; the last, which no exit but the last can reach, at the last.
    """
    limits = np.repeat(np.arange(1.0, exits + 1)[:, None], exits, axis=1)
    limits[:, -1] = -inf
    return limits


def below_top(logits: ArrayLike, exit: int) -> Floats:
    """Return an exit's logits [N, C] minus each sample's largest, in float64; `exit` is its number, for messages.

    Raises:
        UserError: a sample's logits hold a NaN or +infinity, or nothing else than -infinity.
    """
    # In C order, so that a row is summed in one order whatever the layout of the logits.
    z = np.array(logits, dtype=np.float64, order="C")
    top = z.max(axis=1, keepdims=True)
    if not np.isfinite(top).all():
        raise UserError(f"the logits of exit {exit} are not finite; evaluation needs finite outputs")
    # A difference beyond the float64 range becomes -inf, whose probability is the 0 it would be anyway.
    with np.errstate(over="ignore"):
        z -= top
    return z


def checked_temperatures(temperatures: ArrayLike, exits: int) -> Floats:
    """Return temperatures [K] in float64.

    Raises:
        UserError: there is not one for each exit, or one is not a positive number.
    """
    values = np.asarray(temperatures, dtype=np.float64)
    if values.shape != (exits,):
        raise UserError(f"temperatures of shape {values.shape}; expected one for each of the {exits} exits")
    if not (np.isfinite(values) & (values > 0)).all():
        raise UserError(f"temperatures {values.tolist()}; expected positive numbers")
    return values


def _confidence(z: Floats) -> Floats:
    result: Floats = 1 / np.exp(z).sum(axis=1)
    return result


def _margin(z: Floats) -> Floats:
    largest = 1 / np.exp(z).sum(axis=1)
    if z.shape[1] == 1:
        return np.ones_like(largest)
    # p_1 - p_2 = p_1 (1 - exp(z_2)), as the largest z is 0: small margins lose no digits to the difference.
    second = np.partition(z, -2, axis=1)[:, -2]
    result: Floats = -np.expm1(second) * largest
    return result


def _entropy(z: Floats) -> Floats:
    classes = z.shape[1]
    if classes == 1:
        return np.ones(len(z))
    weights = np.exp(z)
    total = weights.sum(axis=1)
    # H = log sum_c e^z_c - sum_c p_c z_c; a class that is ruled out adds 0, not 0 times infinity.
    spread = np.log(total) - (weights * np.where(weights > 0, z, 0)).sum(axis=1) / total
    # Rounding may put nearly uniform outputs slightly below 0.
    result: Floats = np.maximum(1 - spread / log(classes), 0)
    return result


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
