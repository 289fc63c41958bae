"""The rule `shares`: each exit's threshold lets its share of the validation samples leave, pi_k ~ q^k.

Paper: Huang et al., "Multi-scale dense networks for resource efficient image classification", ICLR 2018, section 5
(https://arxiv.org/abs/1703.09844); see `exitkit.inference.thresholds`, whose functions this rule calls. It does not
read labels. The operating points are the papers' 39 values of q and infinity, at which all samples leave at the last
exit. Patience has no shares: its operating points are 1 to K exits that agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from exitkit.inference.rules.base import ThresholdRule, Validation
from exitkit.inference.scores import patience_thresholds
from exitkit.inference.thresholds import PAPER_SHARES, Floats, exit_counts, thresholds


@dataclass(frozen=True, eq=False)
class SharesRule(ThresholdRule):
    """The rule `shares`; see `ThresholdRule`."""

    name: ClassVar[str] = "shares"


def share_thresholds(values: Floats) -> Floats:
    """Return the thresholds [P, K] of the 40 operating points on validation scores [N, K]."""
    samples, exits = values.shape
    return thresholds(values, exit_counts(samples, exits, (*PAPER_SHARES, inf)))


def fit(validation: Validation, score: str = "confidence") -> SharesRule:
    """Return the rule; see `rules.fit_rule`.

    Raises:
        UserError: the score is unknown, or a logit is not finite.
    """
    if score == "patience":
        return SharesRule(score, patience_thresholds(len(validation.costs)))
    return SharesRule(score, share_thresholds(validation.outputs.scores(score)))
