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
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from exitkit.errors import unknown
from exitkit.inference.outputs import ExitOutputs, ExitView
from exitkit.inference.rules.base import Booleans, SequentialRule, Validation
from exitkit.inference.rules.shares import share_thresholds
from exitkit.inference.scores import Agreement
from exitkit.inference.thresholds import Floats

WEIGHTS = ("cost", "linear", "accuracy")
"""Names of the weights of the exits."""


def agreement_scores(logits: ArrayLike | ExitOutputs, weights: ArrayLike) -> Floats:
    """Return S, [N, K], from logits [N, K, C], or outputs, and weights [K]."""
    weight = np.asarray(weights, dtype=np.float64)
    outputs = ExitOutputs.of(logits, len(weight))
    result = np.empty((len(outputs), len(weight)))
    before = None
    for view in outputs.exits:
        before = _add(view, weight[view.index], before)
        result[:, view.index] = before.exits
    return result


def _add(view: ExitView, weight: float, before: Agreement | None) -> Agreement:
    """Return the predicted class and S at an exit, with S in place of the number of exits."""
    total, predicted = weight * view.score("confidence"), view.predicted
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

    def decide(self, view: ExitView, memory: Any) -> tuple[Booleans, Any]:
        """Return which samples leave, [N, P], and the memory (predicted class, S); see `SequentialRule.decide`."""
        state = _add(view, self.weights[view.index], None if memory is None else Agreement(*memory))
        return state.exits[:, None] >= self.limits[:, view.index], state


def fit(validation: Validation, *, weights: Literal["cost", "linear", "accuracy"] = "cost") -> AgreementRule:
    """Return the rule; see `rules.fit_rule`.

    Args:
        validation: the outputs.
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
    return AgreementRule(share_thresholds(agreement_scores(validation.outputs, values)), values)
