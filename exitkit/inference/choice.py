"""The exit rule of a run: operating points of its validation outputs, and which of them is wanted."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from exitkit.budgets import exit_costs, read_budget
from exitkit.calibration import fit_temperatures
from exitkit.errors import Note, UserError
from exitkit.evaluation import Floats, Share, correct, exit_counts, leave_at, paper_shares, share_for_budget, thresholds
from exitkit.exit_rules import patience_thresholds, scores
from exitkit.inference.rule import ExitRule
from exitkit.operating_points import most_accurate_within
from exitkit.runs import RunFolder


class _Points(NamedTuple):
    limits: Floats
    cost: Floats
    accuracy: Floats


def choose(
    run: RunFolder | str, *, budget: float | str | None, share: Share | None, score: str, calibrated: bool
) -> ExitRule:
    """Return the rule of a run; see `ExitRule.from_run`."""
    run = run if isinstance(run, RunFolder) else RunFolder(run)
    run.results()  # says how to go on with one that is not finished
    outputs = run.outputs("validation")
    in_time = isinstance(budget, str) and budget.endswith("ms")
    costs = exit_costs(run, "latency" if in_time else "macs")
    return choose_for(outputs["logits"], outputs["labels"], costs, budget, share, score, calibrated)


def choose_for(
    logits: np.ndarray,
    labels: np.ndarray,
    costs: Floats,
    budget: float | str | None,
    share: Share | None,
    score: str,
    calibrated: bool,
) -> ExitRule:
    """Return the rule for some outputs; see `ExitRule.from_outputs`."""
    if budget is not None and share is not None:
        raise UserError(f"both budget {budget} and share {share} are given; expected one of them")
    if share is not None and score == "patience":
        raise UserError("patience has no shares: its operating points are 1 to K exits that agree; give a budget")
    heat = fit_temperatures(logits, labels) if calibrated else None
    sure = scores(logits, score, heat)
    hits = correct(logits, labels)
    wanted = read_budget(budget) if isinstance(budget, str) else budget
    if wanted is not None and not wanted >= costs[0]:
        raise UserError(f"budget {budget} is below what the first exit costs, {costs[0]:.6g}; expected more")
    if wanted is not None and wanted >= costs[-1]:
        told = f"budget {budget} is enough for the last exit always ({costs[-1]:.6g}): no image leaves early"
        warnings.warn(Note(told), stacklevel=4)
    limits = _limits(sure, costs, score, wanted, share)
    points = _tried(limits, sure, hits, costs)
    chosen = 0
    if score == "patience" and wanted is not None:
        (chosen,) = most_accurate_within(points.cost, points.accuracy, np.array([wanted]))
    elif share is None and wanted is None:
        enough = points.accuracy >= hits[:, -1].mean()
        chosen = int(np.where(enough, points.cost, np.inf).argmin())
    temperatures = None if heat is None else tuple(heat.tolist())
    return ExitRule(score, tuple(points.limits[chosen].tolist()), temperatures)


def _limits(sure: Floats, costs: Floats, score: str, budget: float | None, share: Share | None) -> Floats:
    """Return the thresholds of every point that may be chosen, [P, K]."""
    samples, exits = sure.shape
    if score == "patience":
        return patience_thresholds(exits)
    if budget is not None:
        q: tuple[Share, ...] = tuple(share_for_budget(costs, [budget]).tolist())
    else:
        q = (*paper_shares(), np.inf) if share is None else (share,)
    return thresholds(sure, exit_counts(samples, exits, q))


def _tried(limits: Floats, sure: Floats, hits: np.ndarray, costs: Floats) -> _Points:
    left = leave_at(sure, limits)
    accuracy = hits[np.arange(len(hits)), left].mean(axis=1)
    return _Points(limits, costs[left].mean(axis=1), accuracy)
