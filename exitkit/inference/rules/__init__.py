"""Rules that decide where samples leave, fitted on stored validation outputs: one rule a file, chosen by name.

`fit_rule` fits a rule at all its operating points; the logits may be the log-probabilities of a combination. Nothing
here loads a network, and no test sample is read. See `rules.base` for what all rules have in common.

Accuracy on the samples of the fit is optimistic for every rule that reads labels (all but `shares` and, with its
weights of the costs, `agreement`): compare rules on other samples, or by cross-fitting.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

from numpy.typing import ArrayLike

from exitkit.errors import UserError, unknown
from exitkit.inference.as_json import parsed, reading
from exitkit.inference.rule import ExitRule
from exitkit.inference.rules import agreement, eenet, fitted, jei, shares, stopping
from exitkit.inference.rules.base import FittedRule, PointRule, SequentialRule, Validation

__all__ = [
    "RULES",
    "SCORED",
    "FittedRule",
    "PointRule",
    "fit_rule",
    "fit_validated",
    "reads",
    "rule_fields",
    "rule_from_json",
]

_FITS: dict[str, Callable[..., FittedRule]] = {
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
SCORED = tuple(name for name, fit in _FITS.items() if "score" in inspect.signature(fit).parameters)
"""Names of the rules that read a score of `scores.SCORES`; the others compute their own."""


def reads(rule: str, score: str) -> bool:
    """Whether a rule reads a score of `scores.SCORES`."""
    return rule in SCORED and (rule, score) != ("stopping", "patience")


def rule_fields(name: str) -> dict[str, Any]:
    """Return the fields of a rule besides its score, {field: type}: the keyword arguments of its `fit`."""
    hints = typing.get_type_hints(_FITS[name])
    named = inspect.signature(_FITS[name]).parameters.values()
    return {field.name: hints[field.name] for field in named if field.kind is field.KEYWORD_ONLY}


def fit_rule(
    name: str,
    logits: ArrayLike,
    labels: ArrayLike,
    costs: ArrayLike,
    *,
    score: str = "confidence",
    seed: int = 0,
    **fields: Any,
) -> FittedRule:
    """Return a rule, fitted on validation outputs at all its operating points.

    Args:
        name: one of `RULES`.
        logits: [N, K, C]; -infinity excludes a class.
        labels: classes [N], 0..C-1.
        costs: cumulative cost of leaving at each exit, [K], in any unit.
        score: one of `scores.SCORES`, of the rules in `SCORED`; the others accept confidence only.
        seed: seed of the rules that are trained by gradient descent, `jei` and `eenet`.
        fields: further fields of the rule; see `rule_fields`.

    Raises:
        UserError: the rule, the score or a field is unknown, the rule does not read that score, a shape, label or cost
            is wrong, or a logit is not finite.
    """
    return fit_validated(name, Validation.checked(logits, labels, costs), score=score, seed=seed, **fields)


def fit_validated(
    name: str, validation: Validation, *, score: str = "confidence", seed: int = 0, **fields: Any
) -> FittedRule:
    """Return a rule, fitted on outputs that were checked; see `fit_rule`."""
    if name not in _FITS:
        raise unknown("rule", name, RULES)
    if score != "confidence" and name not in SCORED:
        raise UserError(f"the rule {name} does not read the score {score}; rules that do: {', '.join(SCORED)}")
    if seed < 0:
        raise UserError(f"seed is {seed}; expected 0 or more")
    known = rule_fields(name)
    for field in fields:
        if field not in known:
            raise unknown(f"field of the rule {name}", field, known)
    values: dict[str, Any] = {"score": score} if name in SCORED else {}
    values |= {"seed": seed} if "seed" in known else {}
    return _FITS[name](validation, **values | fields)


def rule_from_json(text: str) -> PointRule:
    """Return the rule of one operating point from the text that its `to_json` returned; other keys are ignored.

    Raises:
        UserError: the text is not a rule.
    """
    with reading(text, "a rule"):
        table = parsed(text, {}).get("rule")
        if table is None:
            return ExitRule.from_json(text)
        if table["name"] not in _SEQUENTIAL:
            raise unknown("rule", table["name"], _SEQUENTIAL)
        rule = _SEQUENTIAL[table["name"]].from_parts(table)
        if rule.points != 1 or rule.exits < 1:
            raise ValueError(f"{rule.points} operating points")
        return rule
