"""Tidy tables of run folders: one row per method and exit, budget or operating point."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from exitkit.benchmarks.report.comparison import BASELINE, GROUP, STATIC, Comparison, Context
from exitkit.benchmarks.report.comparisons import differences, published_beside, stitch, training, verdicts
from exitkit.benchmarks.report.labels import Names, in_common, name_runs, unlike
from exitkit.benchmarks.report.measure import FinishedRun, RunMeasures, anytime_rows
from exitkit.benchmarks.report.options import COST_COLUMNS, ReportOptions
from exitkit.errors import UserError
from exitkit.inference.budgets import exit_costs, read_budget


class _Named(NamedTuple):
    run: FinishedRun
    names: Names


def collect(
    runs: Iterable[FinishedRun],
    *,
    budgets: int = 9,
    options: ReportOptions | None = None,
    context: Context | None = None,
) -> Comparison:
    """Evaluate finished runs, anytime and budgeted batch, and average over seeds.

    Runs of the same backbone and data set are compared with each other. By default, the budgets are evenly spaced
    between the highest cost of a first exit and the lowest cost of a last exit, both excluded, so that every run can
    meet each of them. For each budget, the exit shares are those whose planned cost is the budget, and the thresholds
    are computed from the validation outputs.

    Args:
        runs: finished runs, in the order in which the methods are shown.
        budgets: number of budgets, if the options give none.
        options: options of the report.
        context: title, published tables and planned runs.

    Raises:
        UserError: there are no runs, a method has the same seed twice, or the runs cannot be compared.
    """
    options, context = options or ReportOptions(), context or Context()
    finished = list(runs)
    if not finished:
        raise UserError("no finished runs to compare; expected at least one")
    missing_identities = [run.identity for run in context.missing]
    identities = [run.identity for run in finished]
    labels = name_runs([*(_without_weights(identity) for identity in identities), *missing_identities])
    named = [
        _Named(run, names._replace(method=STATIC) if _static_exit(run.identity) else names)
        for run, names in zip(finished, labels, strict=False)
    ]
    groups: dict[tuple[str, str], list[_Named]] = {}
    for member in named:
        groups.setdefault((member.names.backbone, member.names.dataset), []).append(member)
    parts: dict[str, list[pd.DataFrame]] = {}
    notes: dict[tuple[str, str], Sequence[str]] = {}
    shared: dict[tuple[str, str], str] = {}
    for group, members in groups.items():
        _check_seeds(members)
        notes[group] = unlike([m.run.identity for m in members], [m.names.method for m in members])
        shared[group] = in_common([m.run.identity for m in members])
        for name, rows in _measure_group(members, options, budgets).items():
            parts.setdefault(name, []).append(rows)
    tables = {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()}
    anytime = _over_seeds(tables["anytime"], ["exit", "papers", "macs"])
    baseline = options.baseline or BASELINE
    missing = [
        (*names, json.loads(run.identity["seed"]), run.reason)
        for names, run in zip(labels[len(finished) :], context.missing, strict=True)
    ]
    return Comparison(
        options=options,
        context=context,
        anytime=anytime,
        budgeted=_over_seeds(tables["budgeted"], ["budget"]),
        curve=_over_seeds(tables["curve"], ["point"]),
        points=tables["points"]
        .drop(columns="seed")
        .groupby(["method", *GROUP, "point"], sort=False)
        .mean()
        .reset_index(),
        oracle=_over_seeds(tables["oracle"], ["exit"]),
        static=_static(named, options),
        stitched=_over_seeds(stitch(tables["stitch"]), ["budget"], ["method", "family", "dataset"]),
        calibration=_over_seeds(tables["calibration"], ["where"], of="error"),
        risk=_risk(tables["risk"]),
        verdicts=verdicts(tables["anytime"], tables["budgeted"]),
        differences=differences(tables["anytime"], tables["curve"], baseline),
        published=published_beside(named, anytime, context),
        training=training(tables["training"], baseline),
        missing=_missing(named, missing),
        notes=notes,
        shared=shared,
        images=_images(tables["images"]),
        names={run.path.name: names for run, names in named},
    )


def _static_exit(identity: Mapping[str, str]) -> int:
    """Return the exit (from 1) of a run that was trained with one exit only; 0 if it was trained with several."""
    weights = json.loads(identity.get("method.weights", "null"))
    positive = [k for k, w in enumerate(weights, 1) if w > 0] if isinstance(weights, list) else []
    return positive[0] if len(positive) == 1 else 0


def _without_weights(identity: Mapping[str, str]) -> Mapping[str, str]:
    """Remove the exit weights of static networks, so that they do not appear in the labels of other runs."""
    return {**identity, "method.weights": "null"} if _static_exit(identity) else identity


def _check_seeds(members: Sequence[_Named]) -> None:
    """Raise UserError if a method has the same seed twice."""
    first: dict[tuple[str, int, int], FinishedRun] = {}
    for run, names in members:
        twin = first.setdefault((names.method, run.recipe.seed, _static_exit(run.identity)), run)
        if twin is not run:
            raise UserError(
                f"{twin.path} and {run.path} are both {names.method} with seed {run.recipe.seed}; "
                "expected each seed of a method once"
            )


def _budgets(members: Sequence[_Named], options: ReportOptions, count: int) -> np.ndarray:
    if options.budgets:
        return np.array([read_budget(text) for text in options.budgets])
    costs = [exit_costs(run, options.cost) for run, _ in members]
    low, high = max(cost[0] for cost in costs), min(cost[-1] for cost in costs)
    if low >= high:
        names = members[0].names
        raise UserError(
            f"the runs of {names.backbone} on {names.dataset} have no common budget: "
            f"a first exit costs {low}, a last exit {high}; expected every first exit to cost less than every last exit"
        )
    return np.linspace(low, high, count + 2)[1:-1]


def _measure_group(members: Sequence[_Named], options: ReportOptions, count: int) -> dict[str, pd.DataFrame]:
    parts: dict[str, list[pd.DataFrame]] = {}
    samples: np.ndarray | None = None
    adaptive = [member for member in members if member.names.method != STATIC]
    grid = _budgets(adaptive or members, options, count)
    for run, names in adaptive or members:
        measures = RunMeasures(run, names, options)
        indices = np.sort(measures.test["indices"])
        if samples is not None and not np.array_equal(indices, samples):
            raise UserError(f"{run.path} and {members[0].run.path} were tested on different samples")
        samples = indices
        frames = measures.frames(grid)
        frames["training"] = pd.DataFrame([{**measures.same, **run.training_cost()}])
        curve = measures.curve
        validation = {"validation_cost": curve.validation_cost, "validation_accuracy": curve.validation_accuracy}
        frames["stitch"] = pd.DataFrame({**measures.same, **validation, "cost": curve.cost, "accuracy": curve.accuracy})
        for name, rows in frames.items():
            parts.setdefault(name, []).append(rows)
    return {name: pd.concat(rows, ignore_index=True) for name, rows in parts.items()}


def _images(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Return the numbers of images per data set: "1,097 training, 200 validation and 500 test images of ..."."""
    texts: dict[str, dict[str, None]] = {}
    for row in rows.to_dict("records"):
        training = f"{row['training']:,} training, " if row["training"] else ""
        counts = f"{training}{row['validation']:,} validation and {row['test']:,} test images"
        texts.setdefault(row["dataset"], {})[f"{counts} of {row['classes']:,} classes"] = None
    return {dataset: list(counts) for dataset, counts in texts.items()}


def _static(named: Sequence[_Named], options: ReportOptions) -> pd.DataFrame:
    columns = [*GROUP, "exit", "cost_mean", "accuracy_mean", "accuracy_sd", "n"]
    rows = []
    for run, names in named:
        exit = _static_exit(run.identity)
        if exit:
            row = anytime_rows(run, {"seed": run.recipe.seed, **names._asdict()}, options.cost).iloc[[exit - 1]]
            rows.append(row.assign(cost=row[COST_COLUMNS[options.cost]]))
    if not rows:
        return pd.DataFrame(columns=columns)
    return _over_seeds(pd.concat(rows, ignore_index=True), ["exit"], GROUP)[columns]


def _risk(rows: pd.DataFrame) -> pd.DataFrame:
    table = _over_seeds(rows, [])
    counts = rows.groupby(["method", *GROUP], sort=False).agg(found=("point", "count"), drop_mean=("drop", "mean"))
    return table.merge(counts.reset_index(), on=["method", *GROUP])


def _missing(named: Sequence[_Named], planned: list[tuple[Any, ...]]) -> pd.DataFrame:
    """Return the planned runs that are not finished, and the seeds that only other methods of the same table have."""
    missing = pd.DataFrame(planned, columns=["method", *GROUP, "seed", "reason"])
    known = {tuple(row) for row in missing[["method", *GROUP, "seed"]].itertuples(index=False)}
    rows = []
    finished: dict[tuple[str, ...], dict[int, None]] = {}
    for run, names in named:
        finished.setdefault(tuple(names), {})[run.recipe.seed] = None
    for method, seeds in finished.items():
        expected = sorted({seed for other, others in finished.items() if other[1:] == method[1:] for seed in others})
        gaps = [(*method, seed) for seed in expected if seed not in seeds]
        rows += [(*gap, "no run with this seed") for gap in gaps if gap not in known]
    return pd.concat([missing, pd.DataFrame(rows, columns=missing.columns)], ignore_index=True) if rows else missing


def _over_seeds(
    rows: pd.DataFrame, keys: list[str], by: Sequence[str] = ("method", *GROUP), of: str = "accuracy"
) -> pd.DataFrame:
    means = {f"{name}_mean": (name, "mean") for name in ("cost",) if name in rows}
    means |= {name: (name, "mean") for name in ("milliseconds",) if name in rows}
    counted = rows.assign(counted=rows[of])
    table = (
        counted.groupby([*by, *keys], sort=False)
        .agg(**means, **{f"{of}_mean": (of, "mean"), f"{of}_sd": (of, "std")}, n=("counted", "count"))
        .reset_index()
    )
    return table
