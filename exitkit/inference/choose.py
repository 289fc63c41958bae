"""Choice of an exit rule, or of another policy, among the operating points of validation outputs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from exitkit.errors import Note, UserError
from exitkit.inference.budgets import exit_costs
from exitkit.inference.calibration import fit_temperatures
from exitkit.inference.outputs import Embeddings
from exitkit.inference.policy import ExitPolicy, FittedPolicy, PolicyName, cross_fit, fit_policy, read_policy
from exitkit.inference.rule import ExitRule
from exitkit.inference.rules.base import Validation
from exitkit.inference.scores import patience_thresholds, scores
from exitkit.inference.targets import Candidates, Target, choose_point, promised
from exitkit.inference.thresholds import (
    Floats,
    Share,
    exit_counts,
    leave_at,
    paper_shares,
    share_for_budget,
    thresholds,
)
from exitkit.runs.folder import RunFolder


class EmbeddedRun(Protocol):
    """A run that may have stored embeddings; `exitkit.RunFolder` implements it."""

    def outputs(self, part: str) -> Mapping[str, np.ndarray]:
        """Return logits [N, K, C], labels [N] and indices [N] of "validation" or "test"."""

    def embeddings(self, part: str) -> Sequence[np.ndarray]:
        """Return the embeddings of each exit, [N, d_k]."""

    def curvature(self) -> Mapping[str, np.ndarray]:
        """Return the curvature of the exits' last layers."""


_FINE = 201
"""Operating points that a target is chosen from: enough for half a percent of the costs."""


def rule_of_run(
    run: RunFolder | str | Path,
    *,
    budget: float | str | None = None,
    share: Share | None = None,
    score: str = "confidence",
    calibrated: bool = False,
    **target: Any,
) -> ExitRule:
    """Choose the exit rule of a finished run, on its stored validation outputs only (`exitkit.ExitRule.from_run`).

    Args:
        run: the run, or its folder.
        budget: mean cost per image: multiply-adds (`40e6`, `"40M"`), a share of the last exit's cost (`"60%"`), or
            milliseconds as measured by `exitkit bench` (`"1.5ms"`); the shares of the exits follow from BoostNet's
            equation 9.
        target: instead of a budget, `latency` or `latency_p95` (milliseconds: 5 or `"5ms"`), `lose` (percentage points,
            guaranteed with the probability `certainty`), or `accuracy` (percent); `at_most=True` makes a budget or a
            latency an upper bound. See `exitkit.inference.targets`.
        share: instead of a budget, the ratio q between the shares of neighbouring exits. Without both: the lowest-cost
            of the papers' operating points that is at least as accurate as the last exit.
        score: one of `scores.SCORES`.
        calibrated: whether to divide the logits of each exit by a temperature fitted on the validation samples (with a
            certainty, on the half of them that the thresholds are chosen on).

    Raises:
        UserError: the run does not exist or is unfinished, the target can't be reached, or both a target and share are
            given.
    """
    chosen = Target.of(budget=budget, **target)
    return _choose(_validation(run, chosen), chosen, share, score, calibrated)


def rule_for_target(run: RunFolder | str | Path, target: Target) -> ExitRule:
    """Choose the exit rule of a finished run by confidence; see `rule_of_run`."""
    return _choose(_validation(run, target), target, None, "confidence", False)


def rule_for_outputs(
    logits: np.ndarray,
    labels: np.ndarray,
    costs: Sequence[float] | Floats,
    target: Target,
    score: str = "confidence",
    calibrated: bool = False,
) -> ExitRule:
    """Choose an exit rule from validation outputs, for a target; see `rule_of_outputs`."""
    return _choose(Validation.checked(logits, labels, costs), target, None, score, calibrated)


def rule_of_outputs(
    logits: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    costs: Sequence[float],
    *,
    budget: float | str | None = None,
    share: Share | None = None,
    score: str = "confidence",
    calibrated: bool = False,
    **target: Any,
) -> ExitRule:
    """Choose the exit rule of a network that was trained in a custom loop (`exitkit.ExitRule.from_outputs`).

    Args:
        logits: outputs of all exits for validation images, a tensor or an array [N, K, C]; the network must not be
            trained on these images.
        labels: classes of the images, [N].
        costs: cumulative cost of an image up to each exit, [K], in the unit of the budget.
        budget, share, score, calibrated, target: see `rule_of_run`.

    Raises:
        UserError: shapes or costs are wrong, or see `rule_of_run`.
    """
    chosen = Target.of(budget=budget, **target)
    validation = Validation.checked(_array("logits", logits), _array("labels", labels), costs)
    return _choose(validation, chosen, share, score, calibrated)


def policy_of_run(
    run: RunFolder | str | Path, policy: PolicyName | str, *, budget: float | str | None = None, **target: Any
) -> ExitPolicy:
    """Choose a policy's operating point for a finished run, on its validation outputs (`exitkit.ExitPolicy.from_run`).

    The point is the one that `exitkit policies` reports: the most accurate within the budget, both by cross-fitting.

    Args:
        run: the run, or its folder.
        policy: the policy, or its text, such as `mie+stopping`; see `exitkit.inference.policy.read_policy`.
        budget, target: as in `rule_of_run`. None: the lowest-cost point that is at least as accurate as the last exit's
            own outputs, or the most accurate if none is.

    Raises:
        UserError: the run does not exist or is unfinished, the policy is unknown or can't be fitted, or no operating
            point reaches the target.
    """
    (chosen,) = policies_of_run(run, policy, [Target.of(budget=budget, **target)])
    return chosen.policy


class ChosenPolicy(NamedTuple):
    """A policy at an operating point, and what it reached on validation images that it was not fitted on.

    Its accuracy on the images of the fit would be too high.
    """

    policy: ExitPolicy
    validation: dict[str, Any]
    """See `targets.promised`: by cross-fitting; with a certainty, on the half that the point was tested on."""


def policies_of_run(
    run: RunFolder | str | Path, policy: PolicyName | str, targets: Sequence[Target | None]
) -> list[ChosenPolicy]:
    """Choose a policy's operating point for each of several targets in one unit, with one fit; see `policy_of_run`."""
    name = _named(policy)
    return _choose_policies(name, _validation(run, targets[0], name.reads_embeddings), targets)


def stored_embeddings(run: EmbeddedRun, part: str) -> Embeddings:
    """Return the embeddings of a run's validation or test images, with the curvature on its training images.

    Raises:
        UserError: they are not stored; the message names the command that stores them.
    """
    return Embeddings(tuple(run.embeddings(part)), run.curvature())


def at_budgets(
    validation: Validation, budgets: Sequence[str], policy: str | None, score: str, calibrated: bool
) -> dict[str, ExitRule | ExitPolicy]:
    """Choose operating points at several budgets; budgets that no point meets are left out.

    Args:
        validation: the validation outputs, with their costs.
        budgets: budgets such as "60%".
        policy: the policy, fitted once; None: an exit rule.
        score, calibrated: of the exit rule, see `rule_of_run`.

    Returns:
        {budget: policy}.
    """
    targets = {budget: Target.of(budget=budget) for budget in budgets}
    points = None if policy is None else _fit_points(read_policy(policy), validation)
    chosen: dict[str, ExitRule | ExitPolicy] = {}
    for budget, target in targets.items():
        with contextlib.suppress(UserError), warnings.catch_warnings(action="ignore", category=Note):
            if points is None:
                chosen[budget] = _choose(validation, target, None, score, calibrated)
            else:
                chosen[budget] = points.at(target).policy
    return chosen


def policy_of_outputs(
    policy: PolicyName | str,
    logits: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    costs: Sequence[float],
    *,
    budget: float | str | None = None,
    **target: Any,
) -> ExitPolicy:
    """Choose a policy's operating point for a network trained in a custom loop (`exitkit.ExitPolicy.from_outputs`).

    Args:
        policy: see `policy_of_run`.
        logits, labels, costs: see `rule_of_outputs`.
        budget, target: see `policy_of_run`.

    Raises:
        UserError: shapes or costs are wrong, or see `policy_of_run`.
    """
    wanted = Target.of(budget=budget, **target)
    validation = Validation.checked(_array("logits", logits), _array("labels", labels), costs)
    (chosen,) = _choose_policies(policy, validation, [wanted])
    return chosen.policy


def _array(name: str, values: Tensor | ArrayLike) -> np.ndarray:
    """Return the values of a tensor on any device, or of an array."""
    if isinstance(values, list | tuple) and any(isinstance(value, Tensor) for value in values):
        stacked = "torch.stack(logits, 1)" if name == "logits" else "torch.cat(labels)"
        raise UserError(f"{name} are a {type(values).__name__} of tensors; expected one tensor ({stacked})")
    if isinstance(values, Tensor):
        plain = values.detach().cpu()
        return (plain.float() if plain.is_floating_point() else plain).numpy()
    try:
        return np.asarray(values)
    except ValueError:
        raise UserError(f"{name} are a {type(values).__name__} of unequal lengths; expected an array") from None


def _validation(run: RunFolder | str | Path, target: Target | None, embedded: bool = False) -> Validation:
    """Return the validation outputs of a finished run, with costs in the unit of the target.

    `embedded`: with their embeddings.
    """
    run = RunFolder.of(run)
    run.results()  # the error for an unfinished run explains how to resume it
    outputs = run.outputs("validation")
    costs = exit_costs(run, target.unit if target else "macs")
    embeddings = stored_embeddings(run, "validation") if embedded else None
    return Validation.checked(outputs["logits"], outputs["labels"], costs, embeddings)


def _choose_policies(
    policy: PolicyName | str, validation: Validation, targets: Sequence[Target | None]
) -> list[ChosenPolicy]:
    for target in targets:
        if target is not None:
            target.check_certain(len(validation.labels))
    name = _named(policy)
    certain = [target is not None and target.certainty is not None for target in targets]
    points = None if all(certain) else _fit_points(name, validation)
    return [
        points.at(target) if points is not None and not guaranteed else _certain_policy(name, validation, target)
        for target, guaranteed in zip(targets, certain, strict=True)
    ]


def _named(policy: PolicyName | str) -> PolicyName:
    """Return a policy's name, given as such or as text.

    Raises:
        UserError: it is unknown, or neither.
    """
    if isinstance(policy, str):
        return read_policy(policy)
    if not isinstance(policy, PolicyName):
        raise UserError(f"policy is {policy!r}; expected a name, such as mie+stopping")
    return policy


class _Points(NamedTuple):
    """A fitted policy, and its cross-fitted operating points."""

    policy: FittedPolicy
    candidates: Candidates

    def at(self, target: Target | None) -> ChosenPolicy:
        """Return the policy at the point that a target asks for; None: that of the lowest cost without loss."""
        if target is not None:
            point = choose_point(target, self.candidates)
        else:
            accuracy = self.candidates.accuracy
            enough = accuracy >= self.candidates.full.mean()
            lowest = np.where(enough, self.candidates.mean_cost, np.inf).argmin()
            point = int(lowest if enough.any() else accuracy.argmax())
        return ChosenPolicy(self.policy.at(point), promised(self.candidates, point))


def _fit_points(name: PolicyName, validation: Validation) -> _Points:
    (fitted,) = cross_fit([name], validation)
    full = validation.correct()[:, -1]
    return _Points(fitted.policy, Candidates(validation.costs, fitted.leaves, fitted.hits, full))


def _certain_policy(name: PolicyName, validation: Validation, target: Target | None) -> ChosenPolicy:
    """Fit a policy on one half of the validation samples, and choose its point by tests on the other half."""
    assert target is not None
    first, second = _halves(validation)
    fitted = fit_policy(name, first.logits, first.labels, first.costs, first.outputs.embeddings)
    leaves, order = fitted.leave_at(second.outputs), validation.costs[fitted.leave_at(first.outputs)].mean(axis=1)
    outputs = fitted.outputs(second.outputs)
    right = outputs.correct(second.labels)
    hits = right[np.arange(len(right)), leaves]
    candidates = Candidates(validation.costs, leaves, hits, second.correct()[:, -1], order)
    point = choose_point(target, candidates)
    return ChosenPolicy(fitted.at(point), promised(candidates, point))


def _halves(validation: Validation) -> tuple[Validation, Validation]:
    """Return every other sample, from the first and from the second on."""
    samples = len(validation.labels)
    return validation.rows(np.arange(0, samples, 2)), validation.rows(np.arange(1, samples, 2))


def _choose(
    validation: Validation, target: Target | None, share: Share | None, score: str, calibrated: bool
) -> ExitRule:
    if target is not None and share is not None:
        raise UserError(f"both {target.text} and share {share} are given; expected one of them")
    if share is not None and (isinstance(share, bool) or not isinstance(share, Real) or not share >= 0):
        raise UserError(f"share is {share!r}; expected the ratio of the shares of neighbouring exits, a number from 0")
    if not isinstance(calibrated, bool | np.bool_):
        raise UserError(f"calibrated is {calibrated!r}; expected True or False")
    if calibrated and score == "patience":
        raise UserError("calibrated has no effect on the score patience; expected calibrated=False")
    if share is not None and score == "patience":
        raise UserError("patience has no shares: its operating points are 1 to K exits that agree; give a budget")
    share = share if share is None or isinstance(share, Fraction) else float(share)
    costs = validation.costs
    exact = target is not None and target.kind == "budget" and not target.at_most
    budget = target.cost(costs) if exact and target is not None else None
    if target is not None and budget is not None and budget >= costs[-1]:
        message = f"{target.text} is at least the last exit's cost ({costs[-1]:.6g}); no image leaves early"
        warnings.warn(Note(message), stacklevel=3)
    fitted_on = tested_on = validation
    if target is not None and target.certainty is not None:
        target.check_certain(len(validation.labels))
        fitted_on, tested_on = _halves(validation)
    temperatures = fit_temperatures(fitted_on.logits, fitted_on.labels) if calibrated else None
    divisors = None if temperatures is None else tuple(temperatures.tolist())
    fitted, tested = (scores(part.logits, score, temperatures) for part in (fitted_on, tested_on))
    limits = _limits(fitted, costs, score, budget, share, fine=target is not None)
    leaves, hits = leave_at(tested, limits), tested_on.correct()
    order = costs[leave_at(fitted, limits)].mean(axis=1)
    candidates = Candidates(costs, leaves, hits[np.arange(len(hits)), leaves], hits[:, -1], order)
    if target is not None and (score == "patience" or not exact):
        chosen = choose_point(target, candidates)
    elif target is None and share is None:
        accurate = candidates.accuracy >= hits[:, -1].mean()
        chosen = int(np.where(accurate, candidates.mean_cost, np.inf).argmin())
    else:
        chosen = 0
    return ExitRule(score, tuple(limits[chosen].tolist()), divisors)


def _limits(
    values: Floats, costs: Floats, score: str, budget: float | None, share: Share | None, *, fine: bool
) -> Floats:
    """Return the thresholds of all operating points to choose from, [P, K]; `fine`: of evenly spaced costs."""
    samples, exits = values.shape
    if score == "patience":
        return patience_thresholds(exits)
    if budget is not None:
        q: tuple[Share, ...] = tuple(share_for_budget(costs, [budget]).tolist())
    elif fine:
        q = tuple(share_for_budget(costs, np.linspace(costs[0], costs[-1], _FINE)).tolist())
    else:
        q = (*paper_shares(), np.inf) if share is None else (share,)
    return thresholds(values, exit_counts(samples, exits, q))


def outcome(
    run: RunFolder | str | Path, policy: ExitPolicy | ExitRule | ChosenPolicy, unit: str = "macs"
) -> dict[str, Any]:
    """Return what a policy costs and reaches on the stored outputs of a run.

    Args:
        run: the finished run.
        policy: the policy, or an exit rule; of a `ChosenPolicy`, the result on validation is its own.
        unit: of the costs, see `exit_costs`.

    Returns:
        `unit`, and for "validation" and "test": mean cost, accuracy and full_accuracy (percent), and shares, the
        share of the images that leaves at each exit.
    """
    run = RunFolder.of(run)
    costs = exit_costs(run, unit)
    result: dict[str, Any] = {"unit": unit}
    parts = ["validation", "test"]
    if isinstance(policy, ChosenPolicy):
        policy, result["validation"] = policy
        parts = ["test"]
    policy = policy if isinstance(policy, ExitPolicy) else ExitPolicy(policy)
    for part in parts:
        outputs = run.outputs(part)
        logits, labels = torch.from_numpy(outputs["logits"]), torch.from_numpy(outputs["labels"])
        embeddings = stored_embeddings(run, part) if policy.reads_embeddings else None
        result[part] = outcome_of_outputs(policy, logits, labels, costs, embeddings)
    return result


def outcome_of_outputs(
    policy: ExitPolicy | ExitRule,
    logits: Tensor,
    labels: Tensor,
    costs: ArrayLike,
    embeddings: Embeddings | None = None,
) -> dict[str, Any]:
    """Return what a policy costs and reaches on the outputs of one part; see `outcome`."""
    policy = policy if isinstance(policy, ExitPolicy) else ExitPolicy(policy)
    predicted, exits = policy.on_outputs(logits, embeddings)
    hits = (predicted.argmax(1) == labels).numpy()[None]
    full = (logits[:, -1].argmax(1) == labels).numpy()
    return promised(Candidates(np.asarray(costs, dtype=np.float64), exits.numpy()[None], hits, full), 0)


def outcome_table(outcome: Mapping[str, Any], target: str) -> str:
    """Return the result of `outcome` as text, with the target in words."""
    unit = "ms" if outcome["unit"] == "latency" else "multiply-adds"
    lines = [f"operating point: {target}"]
    for part in ("validation", "test"):
        got = outcome[part]
        cost = f"{got['cost']:.3f}" if unit == "ms" else f"{got['cost'] / 1e6:.4g} M"
        shares = " ".join(f"{100 * share:.0f}" for share in got["shares"])
        lines.append(
            f"  {part + ':':11} {cost} {unit}, accuracy {got['accuracy']:.2f} % "
            f"(full network {got['full_accuracy']:.2f}); % leaving at each exit: {shares}"
        )
    return "\n".join(lines)
