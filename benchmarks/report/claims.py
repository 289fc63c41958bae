"""Claims of papers, tested on the runs of a study.

A claim says that a sum of measures of some runs is above a sum of measures of others, and by how much. It is computed
for each seed, and Student's t-interval over the seeds decides.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from exitkit.benchmarks.report.collect import common_budgets
from exitkit.benchmarks.report.measure import FinishedRun
from exitkit.benchmarks.report.options import ReportOptions
from exitkit.benchmarks.report.statistics import area_under_curve, paired_difference
from exitkit.benchmarks.report.summary import measured
from exitkit.errors import UserError

LEVEL = 0.95
"""Confidence level of the intervals that decide."""

VERDICTS = ("supported", "contradicted", "undecided at this scale", "not tested yet")


class Term(NamedTuple):
    """One measure of the runs of one method.

    Attributes:
        run: {key of the identity of a run: JSON value}; the runs that have all of them, one per seed.
        measure: see `measure_of`.
    """

    run: Mapping[str, str]
    measure: str


@dataclass(frozen=True)
class Claim:
    """A claim and its test, which was written before the runs.

    Attributes:
        claim: the claim, in our words.
        source: the paper, and where it makes the claim.
        study: name of the folder of the study.
        fixed: the commit that fixed the test.
        test: the test, in words.
        more, less: the claim is that the sum of `more` minus the sum of `less` is above `above`.
        above: see `more`.
    """

    claim: str
    source: str
    study: str
    fixed: str
    test: str
    more: Sequence[Term]
    less: Sequence[Term]
    above: float = 0.0


class Verdict(NamedTuple):
    """Result of a claim's test: mean difference over n seeds minus `above`, its interval, p-value, verdict in words.

    `visible` is half the width of the interval: the smallest effect that the study could have shown; NaN if all seeds
    have the same nonzero difference.
    """

    mean: float
    low: float
    high: float
    p: float
    visible: float
    n: int
    verdict: str


def load_claims() -> list[Claim]:
    """Return the shipped claims, in their order."""
    return [_claim(entry) for entry in _shipped()["claims"]]


def load_experiments() -> pd.DataFrame:
    """Return what the papers trained and what the studies train: columns name, images, network, training."""
    return pd.DataFrame(_shipped()["experiments"])


def _shipped() -> dict[str, Any]:
    text = resources.files("exitkit.benchmarks.published").joinpath("claims.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _claim(entry: Mapping[str, Any]) -> Claim:
    terms = {side: [_term(term) for term in entry.get(side, ())] for side in ("more", "less")}
    return Claim(**{**entry, **terms})


def _term(values: Mapping[str, Any]) -> Term:
    fields = {key: json.dumps(value) for key, value in values.items() if key != "measure"}
    return Term(fields, values["measure"])


def judge(claim: Claim, runs: Sequence[FinishedRun], options: ReportOptions) -> Verdict:
    """Test a claim on the finished runs of its study.

    Seeds count that all terms have. A claim without two such seeds is not tested yet.

    Args:
        claim: the claim.
        runs: the runs of the study, or their summaries.
        options: options of the study's report.

    Raises:
        UserError: a measure of the claim needs probes that the runs do not have, or two runs of a term have one seed.
    """
    budgets = common_budgets(runs, options) if runs else np.empty(0)
    sides = [[_by_seed(term, runs, options, budgets) for term in terms] for terms in (claim.more, claim.less)]
    seeds = sorted(set.intersection(*(set(values) for side in sides for values in side)))
    if len(seeds) < 2:
        return Verdict(np.nan, np.nan, np.nan, np.nan, np.nan, len(seeds), VERDICTS[3])
    totals = [sum(np.array([values[seed] for seed in seeds]) for values in side) for side in sides]
    change = paired_difference(totals[0] - claim.above, totals[1] * np.ones(len(seeds)), LEVEL)
    visible = (change.high - change.low) / 2
    if np.isnan(change.low):  # the same in all seeds
        change = change._replace(low=change.mean, high=change.mean)
    verdict = VERDICTS[0] if change.low > 0 else VERDICTS[1] if change.high < 0 else VERDICTS[2]
    return Verdict(change.mean, change.low, change.high, change.p, visible, len(seeds), verdict)


def _by_seed(term: Term, runs: Sequence[FinishedRun], options: ReportOptions, budgets: np.ndarray) -> dict[int, float]:
    values: dict[int, float] = {}
    for run in runs:
        if all(run.identity.get(key) == value for key, value in term.run.items()):
            if run.recipe.seed in values:
                raise UserError(f"{run.path} is the second run of seed {run.recipe.seed} that fits {dict(term.run)}")
            values[run.recipe.seed] = measure_of(measured(run, options, budgets).tables, term.measure, budgets)
    return values


def measure_of(tables: Mapping[str, pd.DataFrame], name: str, budgets: np.ndarray) -> float:
    """Return one measure of a run.

    Args:
        tables: the tables of `measured`.
        name: "exit K" (accuracy in percent; "exit last" is the last one); "area" (mean height of the budgeted curve
            from the first to the last budget); "budget first", "budget last" (accuracy at that budget); "policy NAME"
            (accuracy with that exit policy, averaged over the budgets), "policy NAME from K" (over those from the K-th
            on); or, averaged over the probes, "valid K" (share of valid images, in percent), "easy K" (weight of the
            easier half of the images minus that of the harder half), "conflict" (share of negative cosines between
            gradients of two exits, in percent), "variance" (mean logarithm of the variance of the trunk's gradient).
        budgets: the budgets of the study.

    Raises:
        UserError: the name is unknown, the curve does not cover the budgets, the policy was not measured at all of
            them, or the run has no probes.
    """
    kind, _, where = name.partition(" ")
    if kind == "exit":
        accuracy = tables["anytime"]["accuracy"]
        return float(accuracy.iloc[-1 if where == "last" else int(where) - 1])
    if kind == "area":
        curve = tables["curve"]
        area = area_under_curve(curve["cost"], curve["accuracy"], budgets[0], budgets[-1])
        if np.isnan(area):
            raise UserError(
                f"the budgeted curve covers mean costs from {curve['cost'].min():.6g} to {curve['cost'].max():.6g}; "
                f"expected budgets within it, not {budgets[0]:.6g} to {budgets[-1]:.6g}"
            )
        return area
    if kind == "budget":
        return float(tables["budgeted"]["accuracy"].iloc[0 if where == "first" else -1])
    if kind == "policy":
        return _with_policy(tables, where)
    if "probes" not in tables:
        raise UserError(f"the measure {name} needs probes; expected runs with probe_every in their recipe")
    probes = tables["probes"]
    column = kind if not where else f"{kind}_{_last(probes, kind) if where == 'last' else where}"
    return float(probes[column].mean())


def _with_policy(tables: Mapping[str, pd.DataFrame], where: str) -> float:
    name, _, first = where.partition(" from ")
    policies = tables.get("policies", pd.DataFrame({"policy": [], "accuracy": []}))
    accuracy = policies["accuracy"][policies["policy"] == name].iloc[int(first or 1) - 1 :]
    if accuracy.empty or accuracy.isna().any():
        raise UserError(f"the policy {name} was not measured at all budgets; expected an operating point at each")
    return float(accuracy.mean())


def _last(probes: pd.DataFrame, kind: str) -> int:
    return sum(name.startswith(f"{kind}_") for name in probes.columns)
