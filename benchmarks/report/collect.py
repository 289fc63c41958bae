"""From run folders to tidy tables: one row per method and exit, budget or operating point."""

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

    Runs of one backbone and data set are compared with one another. Unless the options give budgets, these are spaced
    evenly between the costs that all runs can spend: from the dearest first exit to the cheapest last one, ends left
    out. At each budget a run gets the exit shares whose planned cost is the budget, and thresholds from its
    validation outputs.

    Args:
        runs: in the order in which the methods are to appear.
        budgets: how many budgets, where none are given.
        options: how to measure.
        context: what the folders do not say.

    Raises:
        UserError: no runs, a method twice with one seed, or runs that cannot be compared.
    """
    options, context = options or ReportOptions(), context or Context()
    given = list(runs)
    if not given:
        raise UserError("no finished runs to compare; expected at least one")
    absent = [one.identity for one in context.missing]
    identities = [run.identity for run in given]
    labels = name_runs([*(_without_weights(one) for one in identities), *absent])
    named = [
        _Named(run, names._replace(method=STATIC) if _only_exit(run.identity) else names)
        for run, names in zip(given, labels, strict=False)
    ]
    groups: dict[tuple[str, str], list[_Named]] = {}
    for one in named:
        groups.setdefault((one.names.backbone, one.names.dataset), []).append(one)
    parts: dict[str, list[pd.DataFrame]] = {}
    notes: dict[tuple[str, str], Sequence[str]] = {}
    shared: dict[tuple[str, str], str] = {}
    for group, members in groups.items():
        _check_seeds(members)
        notes[group] = unlike([m.run.identity for m in members], [m.names.method for m in members])
        shared[group] = in_common([m.run.identity for m in members])
        for name, rows in _measure_group(members, options, budgets).items():
            parts.setdefault(name, []).append(rows)
    whole = {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()}
    anytime = _over_seeds(whole["anytime"], ["exit", "papers", "macs"])
    baseline = options.baseline or BASELINE
    missing = [
        (*names, json.loads(one.identity["seed"]), one.reason)
        for names, one in zip(labels[len(given) :], context.missing, strict=True)
    ]
    return Comparison(
        options=options,
        context=context,
        anytime=anytime,
        budgeted=_over_seeds(whole["budgeted"], ["budget"]),
        curve=_over_seeds(whole["curve"], ["point"]),
        points=whole["points"]
        .drop(columns="seed")
        .groupby(["method", *GROUP, "point"], sort=False)
        .mean()
        .reset_index(),
        oracle=_over_seeds(whole["oracle"], ["exit"]),
        static=_static(named, options),
        stitched=_over_seeds(stitch(whole["stitch"]), ["budget"], ["method", "family", "dataset"]),
        calibration=_over_seeds(whole["calibration"], ["where"], of="error"),
        risk=_risk(whole["risk"]),
        verdicts=verdicts(whole["anytime"], whole["budgeted"]),
        differences=differences(whole["anytime"], whole["curve"], baseline),
        published=published_beside(named, anytime, context),
        training=training(whole["training"], baseline),
        missing=_missing(named, missing),
        notes=notes,
        shared=shared,
        images=_images(whole["images"]),
        names={one.run.path.name: one.names for one in named},
    )


def _only_exit(identity: Mapping[str, str]) -> int:
    """Return the exit (from 1) that a run was trained for alone, 0 if for several."""
    weights = json.loads(identity.get("method.weights", "null"))
    positive = [k for k, w in enumerate(weights, 1) if w > 0] if isinstance(weights, list) else []
    return positive[0] if len(positive) == 1 else 0


def _without_weights(identity: Mapping[str, str]) -> Mapping[str, str]:
    """Static references do not make other runs of their method be told apart by the weights of exits."""
    return {**identity, "method.weights": "null"} if _only_exit(identity) else identity


def _check_seeds(members: Sequence[_Named]) -> None:
    """Refuse a seed that counts twice."""
    seen: dict[tuple[str, int, int], FinishedRun] = {}
    for run, names in members:
        twin = seen.setdefault((names.method, run.recipe.seed, _only_exit(run.identity)), run)
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
            f"one's first exit costs {low}, one's last {high}; expected less first than last"
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
        seen = {"validation_cost": curve.validation_cost, "validation_accuracy": curve.validation_accuracy}
        frames["stitch"] = pd.DataFrame({**measures.same, **seen, "cost": curve.cost, "accuracy": curve.accuracy})
        for name, rows in frames.items():
            parts.setdefault(name, []).append(rows)
    return {name: pd.concat(rows, ignore_index=True) for name, rows in parts.items()}


def _images(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Say of how many images each data set's runs are: "1,097 training, 200 validation and 500 test images, ..."."""
    told: dict[str, dict[str, None]] = {}
    for row in rows.to_dict("records"):
        training = f"{row['training']:,} training, " if row["training"] else ""
        counts = f"{training}{row['validation']:,} validation and {row['test']:,} test images"
        told.setdefault(row["dataset"], {})[f"{counts} of {row['classes']:,} classes"] = None
    return {dataset: list(texts) for dataset, texts in told.items()}


def _static(named: Sequence[_Named], options: ReportOptions) -> pd.DataFrame:
    columns = [*GROUP, "exit", "cost_mean", "accuracy_mean", "accuracy_sd", "n"]
    rows = []
    for run, names in named:
        only = _only_exit(run.identity)
        if only:
            row = anytime_rows(run, {"seed": run.recipe.seed, **names._asdict()}, options.cost).iloc[[only - 1]]
            rows.append(row.assign(cost=row[COST_COLUMNS[options.cost]]))
    if not rows:
        return pd.DataFrame(columns=columns)
    return _over_seeds(pd.concat(rows, ignore_index=True), ["exit"], GROUP)[columns]


def _risk(rows: pd.DataFrame) -> pd.DataFrame:
    table = _over_seeds(rows, [])
    more = rows.groupby(["method", *GROUP], sort=False).agg(found=("point", "count"), drop_mean=("drop", "mean"))
    return table.merge(more.reset_index(), on=["method", *GROUP])


def _missing(named: Sequence[_Named], absent: list[tuple[Any, ...]]) -> pd.DataFrame:
    """Return what was planned and is not there, and seeds that other methods of the same table have."""
    found = pd.DataFrame(absent, columns=["method", *GROUP, "seed", "reason"])
    known = {tuple(row) for row in found[["method", *GROUP, "seed"]].itertuples(index=False)}
    rows = []
    have: dict[tuple[str, ...], dict[int, None]] = {}
    for run, names in named:
        have.setdefault(tuple(names), {})[run.recipe.seed] = None
    for called, seeds in have.items():
        wanted = sorted({seed for other, theirs in have.items() if other[1:] == called[1:] for seed in theirs})
        gaps = [(*called, seed) for seed in wanted if seed not in seeds]
        rows += [(*gap, "not there") for gap in gaps if gap not in known]
    return pd.concat([found, pd.DataFrame(rows, columns=found.columns)], ignore_index=True) if rows else found


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
