"""Choosing an exit rule: operating points of validation outputs, and the one that is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from exitkit.errors import Note, UserError
from exitkit.inference.budgets import exit_costs, read_budget
from exitkit.inference.calibration import fit_temperatures
from exitkit.inference.operating_points import most_accurate_within
from exitkit.inference.rule import ExitRule
from exitkit.inference.scores import patience_thresholds, scores
from exitkit.inference.thresholds import (
    Floats,
    Share,
    correct,
    exit_counts,
    leave_at,
    paper_shares,
    realised,
    share_for_budget,
    thresholds,
)
from exitkit.runs.folder import RunFolder


def rule_of_run(
    run: RunFolder | str | Path,
    *,
    budget: float | str | None = None,
    share: Share | None = None,
    score: str = "confidence",
    calibrated: bool = False,
) -> ExitRule:
    """Find the thresholds of a finished run, on its stored validation outputs alone (`exitkit.ExitRule.from_run`).

    Args:
        run: the run, or its folder.
        budget: average cost per image: multiply-adds (`40e6`, `"40M"`), or milliseconds that `exitkit bench` has
            measured (`"1.5ms"`); the shares of the exits come from BoostNet's equation 9.
        share: instead, the ratio q between the shares of neighbouring exits. With neither: the lowest-cost of the
            papers' operating points that is as accurate as the last exit.
        score: one of `scores.SCORES`.
        calibrated: divide each exit's logits by a temperature fitted on the validation samples first.

    Raises:
        UserError: no such run, an unfinished one, a budget below the first exit's cost, or both budget and share.
    """
    run = RunFolder.of(run)
    run.results()  # tells how to resume one that is not finished
    outputs = run.outputs("validation")
    in_time = isinstance(budget, str) and budget.endswith("ms")
    costs = exit_costs(run, "latency" if in_time else "macs")
    return _choose(outputs["logits"], outputs["labels"], costs, budget, share, score, calibrated)


def rule_of_outputs(
    logits: Tensor,
    labels: Tensor,
    costs: Sequence[float],
    *,
    budget: float | str | None = None,
    share: Share | None = None,
    score: str = "confidence",
    calibrated: bool = False,
) -> ExitRule:
    """Find the thresholds of a network that was trained in a loop of one's own (`exitkit.ExitRule.from_outputs`).

    Args:
        logits: the outputs of all exits for each validation image, [N, K, C]; of images that did not train it.
        labels: their classes, [N].
        costs: of an image up to each exit, [K]: multiply-adds, or milliseconds, as the budget.
        budget, share, score, calibrated: see `rule_of_run`.

    Raises:
        UserError: shapes that do not fit, or what `rule_of_run` refuses.
    """
    try:
        known = np.asarray(costs, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"costs are {costs}; expected one number per exit") from None
    if logits.dim() != 3 or not logits.numel() or labels.shape != logits.shape[:1]:
        raise UserError(
            f"logits are of shape {list(logits.shape)}, and labels of {list(labels.shape)}; "
            "expected [N, K, C] and [N], none of them 0"
        )
    if known.shape != logits.shape[1:2]:
        raise UserError(f"costs are {known.tolist()}; expected {logits.shape[1]}, one per exit")
    if not (np.isfinite(known).all() and known[0] > 0 and (np.diff(known) >= 0).all()):
        raise UserError(f"costs are {known.tolist()}; expected positive ones that do not fall from exit to exit")
    arrays = logits.detach().cpu().float().numpy(), labels.cpu().numpy()
    return _choose(*arrays, known, budget, share, score, calibrated)


def _choose(
    logits: np.ndarray,
    labels: np.ndarray,
    costs: Floats,
    budget: float | str | None,
    share: Share | None,
    score: str,
    calibrated: bool,
) -> ExitRule:
    if budget is not None and share is not None:
        raise UserError(f"both budget {budget} and share {share} are given; expected one of them")
    if share is not None and score == "patience":
        raise UserError("patience has no shares: its operating points are 1 to K exits that agree; give a budget")
    temperatures = fit_temperatures(logits, labels) if calibrated else None
    values = scores(logits, score, temperatures)
    hits = correct(logits, labels)
    wanted = read_budget(budget) if isinstance(budget, str) else budget
    if wanted is not None and not wanted >= costs[0]:
        raise UserError(f"budget {budget} is below what the first exit costs, {costs[0]:.6g}; expected more")
    if wanted is not None and wanted >= costs[-1]:
        enough = f"budget {budget} is enough for the last exit always ({costs[-1]:.6g}): no image leaves early"
        warnings.warn(Note(enough), stacklevel=3)
    limits = _limits(values, costs, score, wanted, share)
    points = realised(leave_at(values, limits), hits, costs)
    chosen = 0
    if score == "patience" and wanted is not None:
        (chosen,) = most_accurate_within(points.cost, points.accuracy, np.array([wanted]))
    elif share is None and wanted is None:
        accurate = points.accuracy >= hits[:, -1].mean()
        chosen = int(np.where(accurate, points.cost, np.inf).argmin())
    given = None if temperatures is None else tuple(temperatures.tolist())
    return ExitRule(score, tuple(limits[chosen].tolist()), given)


def _limits(values: Floats, costs: Floats, score: str, budget: float | None, share: Share | None) -> Floats:
    """Return the thresholds of every operating point that may be chosen, [P, K]."""
    samples, exits = values.shape
    if score == "patience":
        return patience_thresholds(exits)
    if budget is not None:
        q: tuple[Share, ...] = tuple(share_for_budget(costs, [budget]).tolist())
    else:
        q = (*paper_shares(), np.inf) if share is None else (share,)
    return thresholds(values, exit_counts(samples, exits, q))
