"""The rule `agreement`: a sample leaves when the weighted confidences of consecutive exits that agree add up.

Paper: Bajpai and Hanawal, "BEEM: Boosting performance of early exit DNNs using multi-exit classifiers as experts",
ICLR 2025 (https://arxiv.org/abs/2502.00745). With the predicted class y_k and the confidence c_k = max p_k of exit k:

    S_k = w_k c_k + S_{k-1} 1[y_k = y_{k-1}],   S_0 = w_0 c_0      [N]
    leave at the first k with S_k >= T_k

With w = 1 and c = 1, S_k is the score patience. The weights are the relative costs w_k = C_k / C_{K-1} (the paper's
BEEM-C), k + 1 ("linear"), or the validation accuracies (BEEM-A).

What differs from the paper and its code: the thresholds are those of the shares q, as for every other score, instead
of thresholds from the exits' error rates. The released code for ALBERT gives an exit that disagrees S = 0, so that its
own confidence does not count, and its code for BERT computes S but leaves by counting exits that agree.

Shapes: N samples, K exits, C classes, P operating points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from exitkit.errors import unknown
from exitkit.inference.rules.base import Booleans, SequentialRule, Validation
from exitkit.inference.rules.shares import share_thresholds
from exitkit.inference.scores import Agreement, exit_scores
from exitkit.inference.thresholds import Floats

WEIGHTS = ("cost", "linear", "accuracy")
"""Names of the weights of the exits."""


def agreement_scores(logits: ArrayLike, weights: ArrayLike) -> Floats:
    """Return S, [N, K], from logits [N, K, C] and weights [K]."""
    outputs, weight = np.asarray(logits), np.asarray(weights, dtype=np.float64)
    result = np.empty(outputs.shape[:2])
    before = None
    for k in range(outputs.shape[1]):
        before = _add(outputs[:, k], weight[k], before, k)
        result[:, k] = before.exits
    return result


def _add(logits: np.ndarray, weight: float, before: Agreement | None, index: int) -> Agreement:
    """Return the predicted class and S at exit `index`, with S in place of the number of exits."""
    total = weight * exit_scores(logits, "confidence", exit=index + 1)[0]
    predicted = logits.argmax(axis=1)
    if before is not None:
        total += np.where(predicted == before.predicted, before.exits, 0)
    return Agreement(predicted, total)


@dataclass(frozen=True, eq=False)
class AgreementRule(SequentialRule):
    """The rule `agreement`.

    Args:
        limits: thresholds T, [P, K].
        weights: w, [K].
    """

    name: ClassVar[str] = "agreement"
    per_point: ClassVar[tuple[str, ...]] = ("limits",)

    limits: Floats
    weights: Floats

    @property
    def exits(self) -> int:
        """The number of exits, K."""
        return len(self.weights)

    def decide(self, index: int, logits: np.ndarray, memory: Any) -> tuple[Booleans, Any]:
        """Return which samples leave, [N, P], and the memory (predicted class, S); see `SequentialRule.decide`."""
        state = _add(logits, self.weights[index], None if memory is None else Agreement(*memory), index)
        return state.exits[:, None] >= self.limits[:, index], state


def fit(validation: Validation, score: str = "confidence", seed: int = 0, *, weights: str = "cost") -> AgreementRule:
    """Return the rule; see `rules.fit_rule`.

    Args:
        validation: the outputs.
        score: must be "confidence", the c of the formula.
        seed: not used; the fit is deterministic.
        weights: one of `WEIGHTS`.

    Raises:
        UserError: the weights are unknown, or a logit is not finite.
    """
    if weights not in WEIGHTS:
        raise unknown("weights of the rule agreement", weights, WEIGHTS)
    costs = validation.costs
    values = {
        "cost": costs / costs[-1],
        "linear": np.arange(1.0, len(costs) + 1),
        "accuracy": validation.correct().mean(axis=0),
    }[weights]
    return AgreementRule(share_thresholds(agreement_scores(validation.logits, values)), values)
