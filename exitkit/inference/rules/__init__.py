"""Rules that decide where samples leave, fitted on stored validation outputs: one rule a file, chosen by name.

`fit_rule` fits a rule at all its operating points; the logits may be the log-probabilities of a combination. Nothing
here loads a network, and no test sample is read. See `rules.base` for what all rules have in common.

Accuracy on the samples of the fit is optimistic for every rule that reads labels (all but `shares` and, with its
weights of the costs, `agreement`): compare rules on other samples, or by cross-fitting.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from numpy.typing import ArrayLike

from exitkit.errors import UserError, unknown
from exitkit.inference.rule import ExitRule
from exitkit.inference.rules import agreement, eenet, fitted, jei, shares, stopping
from exitkit.inference.rules.base import FittedRule, PointRule, SequentialRule, Validation

__all__ = ["RULES", "SCORED", "FittedRule", "PointRule", "fit_rule", "rule_from_json"]

_FITS: dict[str, Callable[[Validation, str, int], FittedRule]] = {
    "shares": shares.fit,
    "agreement": agreement.fit,
    "stopping": stopping.fit,
    "fitted": fitted.fit,
    "jei": jei.fit,
    "eenet": eenet.fit,
}
_SEQUENTIAL: dict[str, type[SequentialRule]] = {
    rule.name: rule for rule in (agreement.AgreementRule, stopping.StoppingRule, jei.GateRule, eenet.SchedulerRule)
}
RULES = tuple(_FITS)
"""Names of the rules."""
SCORED = ("shares", "stopping", "fitted")
"""Names of the rules that read a score of `scores.SCORES`; the others compute their own."""


def fit_rule(
    name: str,
    logits: ArrayLike,
    labels: ArrayLike,
    costs: ArrayLike,
    *,
    score: str = "confidence",
    seed: int = 0,
) -> FittedRule:
    """Return a rule, fitted on validation outputs at all its operating points.

    Args:
        name: one of `RULES`.
        logits: [N, K, C]; -infinity excludes a class.
        labels: classes [N], 0..C-1.
        costs: cumulative cost of leaving at each exit, [K], in any unit.
        score: one of `scores.SCORES`, of the rules in `SCORED`; the others accept confidence only.
        seed: seed of the rules that are trained by gradient descent, `jei` and `eenet`.

    Raises:
        UserError: the rule or the score is unknown, the rule does not read that score, a shape, label or cost is wrong,
            or a logit is not finite.
    """
    if name not in _FITS:
        raise unknown("rule", name, RULES)
    if score != "confidence" and name not in SCORED:
        raise UserError(f"the rule {name} does not read the score {score}; rules that do: {', '.join(SCORED)}")
    return _FITS[name](Validation.checked(logits, labels, costs), score, seed)


def rule_from_json(text: str) -> PointRule:
    """Return the rule of one operating point from the text that its `to_json` returned; other keys are ignored.

    Raises:
        UserError: the text is not a rule.
    """
    try:
        parts = json.loads(text)
        name = parts.get("rule")
        if name is None:
            return ExitRule.from_json(text)
        if name not in _SEQUENTIAL:
            raise unknown("rule", name, _SEQUENTIAL)
        rule = _SEQUENTIAL[name].from_parts(parts)
        if rule.points != 1 or rule.exits < 1:
            raise ValueError(f"{rule.points} operating points")
        return rule
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise UserError(f"{text[:60]!r} is not a rule ({error}); expected the text that to_json returns") from None
