"""Choice of an exit rule among the operating points of validation outputs."""

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
    """Choose the exit rule of a finished run, on its stored validation outputs only (`exitkit.ExitRule.from_run`).

    Args:
        run: the run, or its folder.
        budget: mean cost per image: multiply-adds (`40e6`, `"40M"`), or milliseconds as measured by `exitkit bench`
            (`"1.5ms"`); the shares of the exits follow from BoostNet's equation 9.
        share: instead of a budget, the ratio q between the shares of neighbouring exits. Without both: the lowest-cost
            of the papers' operating points that is at least as accurate as the last exit.
        score: one of `scores.SCORES`.
        calibrated: whether to divide the logits of each exit by a temperature fitted on the validation samples.

    Raises:
        UserError: the run does not exist or is unfinished, the budget is below the first exit's cost, or both budget
            and share are given.
    """
    run = RunFolder.of(run)
    run.results()  # the error for an unfinished run explains how to resume it
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
    """Choose the exit rule of a network that was trained in a custom loop (`exitkit.ExitRule.from_outputs`).

    Args:
        logits: outputs of all exits for validation images, [N, K, C]; the network must not be trained on these images.
        labels: classes of the images, [N].
        costs: cumulative cost of an image up to each exit, [K], in the unit of the budget.
        budget, share, score, calibrated: see `rule_of_run`.

    Raises:
        UserError: shapes or costs are wrong, or see `rule_of_run`.
    """
    try:
        cumulative = np.asarray(costs, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"costs are {costs}; expected one number per exit") from None
    if logits.dim() != 3 or not logits.numel() or labels.shape != logits.shape[:1]:
        raise UserError(
            f"logits have the shape {list(logits.shape)}, and labels {list(labels.shape)}; "
            "expected [N, K, C] and [N], none of them 0"
        )
    if cumulative.shape != logits.shape[1:2]:
        raise UserError(f"costs are {cumulative.tolist()}; expected {logits.shape[1]}, one per exit")
    if not (np.isfinite(cumulative).all() and cumulative[0] > 0 and (np.diff(cumulative) >= 0).all()):
        raise UserError(f"costs are {cumulative.tolist()}; expected positive numbers that do not decrease")
    arrays = logits.detach().cpu().float().numpy(), labels.cpu().numpy()
    return _choose(*arrays, cumulative, budget, share, score, calibrated)


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
    target = read_budget(budget) if isinstance(budget, str) else budget
    if target is not None and not target >= costs[0]:
        raise UserError(f"budget {budget} is below the first exit's cost; expected at least {costs[0]:.6g}")
    if target is not None and target >= costs[-1]:
        message = f"budget {budget} is at least the last exit's cost ({costs[-1]:.6g}); no image leaves early"
        warnings.warn(Note(message), stacklevel=3)
    limits = _limits(values, costs, score, target, share)
    points = realised(leave_at(values, limits), hits, costs)
    chosen = 0
    if score == "patience" and target is not None:
        (chosen,) = most_accurate_within(points.cost, points.accuracy, np.array([target]))
    elif share is None and target is None:
        accurate = points.accuracy >= hits[:, -1].mean()
        chosen = int(np.where(accurate, points.cost, np.inf).argmin())
    divisors = None if temperatures is None else tuple(temperatures.tolist())
    return ExitRule(score, tuple(limits[chosen].tolist()), divisors)


def _limits(values: Floats, costs: Floats, score: str, budget: float | None, share: Share | None) -> Floats:
    """Return the thresholds of all operating points to choose from, [P, K]."""
    samples, exits = values.shape
    if score == "patience":
        return patience_thresholds(exits)
    if budget is not None:
        q: tuple[Share, ...] = tuple(share_for_budget(costs, [budget]).tolist())
    else:
        q = (*paper_shares(), np.inf) if share is None else (share,)
    return thresholds(values, exit_counts(samples, exits, q))
