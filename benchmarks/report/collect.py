"""Tidy tables of run folders: one row per method and exit, budget or operating point."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from exitkit.benchmarks.report.comparison import BASELINE, GROUP, STATIC, Comparison, Context, Missing
from exitkit.benchmarks.report.comparisons import (
    differences,
    policy_differences,
    published_beside,
    stitch,
    training,
    verdicts,
)
from exitkit.benchmarks.report.labels import Names, in_common, name_runs, unlike
from exitkit.benchmarks.report.measure import FinishedRun, Measured
from exitkit.benchmarks.report.options import COST_COLUMNS, ReportOptions
from exitkit.benchmarks.report.summary import measured
from exitkit.errors import DamagedError, Note, UserError
from exitkit.inference.budgets import exit_costs, read_budget
from exitkit.runs.folder import RunFolder


def collect_intact(
    runs: Sequence[RunFolder], options: ReportOptions, context: Context
) -> tuple[Comparison, list[RunFolder]]:
    """Evaluate finished runs as `collect` does; a run with a damaged file is left out, with a `Note` that names it.

    Returns:
        the comparison, and the runs in it.

    Raises:
        UserError: all runs are damaged, or they can't be compared.
    """
    remaining = list(runs)
    while True:
        try:
            return collect(remaining, options=options, context=context), remaining
        except DamagedError as error:
            good = [run for run in remaining if f"{run.path}{os.sep}" not in str(error)]
            if not good or len(good) == len(remaining):
                raise
            warnings.warn(Note(f"a run is left out: {error}"), stacklevel=2)
            remaining = good


def check_latencies(runs: Sequence[RunFolder]) -> None:
    """Check that the latencies of all runs were measured in the same way.

    Raises:
        UserError: a run has none, or they were not.
    """
    for run in runs:
        run.latency()
        ours, theirs = run.latency_settings(), runs[0].latency_settings()
        differs = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
        if differs:
            key = min(differs)
            raise UserError(
                f"the latencies of {runs[0].path} and {run.path} were measured with {key}={theirs.get(key)} and "
                f"{key}={ours.get(key)}; measure them together: exitkit bench {runs[0].path} {run.path}"
            )


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
    if options.cost == "latency":
        check_latencies([run for run in finished if isinstance(run, RunFolder)])
    missing_identities = [run.identity for run in context.missing]
    identities = [run.identity for run in finished]
    labels = _labels([*identities, *missing_identities])
    named = _with_static_rows([_Named(run, names) for run, names in zip(finished, labels, strict=False)])
    parts: dict[str, list[pd.DataFrame]] = {}
    notes: dict[tuple[str, str], Sequence[str]] = {}
    shared: dict[tuple[str, str], str] = {}
    grids: dict[tuple[str, str], np.ndarray] = {}
    measures: dict[str, Measured] = {}
    for group, members in _by_group(named).items():
        _check_seeds(members)
        notes[group] = unlike([m.run.identity for m in members], [m.names.method for m in members])
        shared[group] = in_common([m.run.identity for m in members])
        adaptive = [m.run for m in members if m.names.method != STATIC]
        grids[group] = common_budgets(adaptive, options, budgets)
        measures |= {m.run.path.name: measured(m.run, options, grids[group]) for m in members}
        for name, rows in _group_tables(members, measures, options).items():
            parts.setdefault(name, []).append(rows)
    tables = {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()}
    anytime = _over_seeds(tables["anytime"], ["exit", "papers", "macs"])
    baseline = options.baseline or BASELINE
    return Comparison(
        options=options,
        context=context,
        anytime=anytime,
        budgeted=_over_seeds(tables["budgeted"], ["budget"]),
        spent=_spent(tables.get("spent")),
        curve=_over_seeds(tables["curve"], ["point"]),
        points=_points(tables["points"]),
        oracle=_over_seeds(tables["oracle"], ["exit"]),
        static=_static(tables[STATIC]),
        stitched=_over_seeds(stitch(tables["stitch"]), ["budget"], ["method", "family", "dataset"]),
        calibration=_over_seeds(tables["calibration"], ["where"], of="error"),
        balanced=_balanced(tables.get("balanced", pd.DataFrame(columns=[*_SAME, "balanced", *_BALANCED]))),
        recall=_recall(tables, options),
        targets=_targets(tables.get("targets")),
        risk=_risk(tables["risk"]),
        **_policies(tables if options.policy else {}),
        verdicts=verdicts(tables["anytime"], tables["budgeted"]),
        differences=differences(tables["anytime"], tables["curve"], baseline),
        published=published_beside(named, anytime, context),
        training=training(tables["training"], baseline).iloc[: None if options.times else 0],
        missing=_missing(named, labels[len(finished) :], context.missing),
        notes=notes,
        shared=shared,
        images=_images(tables["images"]),
        names={run.path.name: names for run, names in named},
        budgets=grids,
        measured=measures,
    )


def _labels(identities: Sequence[Mapping[str, str]]) -> list[Names]:
    """Return the names of runs in tables; static networks are called `STATIC`."""
    names = name_runs([_without_weights(identity) for identity in identities])
    pairs = zip(identities, names, strict=True)
    return [name._replace(method=STATIC) if _static_exit(identity) else name for identity, name in pairs]


def _static_exit(identity: Mapping[str, str]) -> int:
    """Return the exit (from 1) of a run that was trained with one exit only; 0 if it was trained with several."""
    weights = json.loads(identity.get("method.weights", "null"))
    positive = [k for k, w in enumerate(weights, 1) if w > 0] if isinstance(weights, list) else []
    return positive[0] if len(positive) == 1 else 0


def _without_weights(identity: Mapping[str, str]) -> Mapping[str, str]:
    """Remove the exit weights of static networks, so that they do not appear in the labels of other runs."""
    return {**identity, "method.weights": "null"} if _static_exit(identity) else identity


def _with_static_rows(named: Sequence[_Named]) -> list[_Named]:
    """Give each static network a row of its own where no other run of the same network and data set is finished."""
    others = {names[1:] for _, names in named if names.method != STATIC}
    return [
        member
        if member.names[1:] in others
        else _Named(member.run, member.names._replace(method=f"{STATIC}, exit {_static_exit(member.run.identity)}"))
        for member in named
    ]


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


def _by_group(named: Sequence[_Named]) -> dict[tuple[str, str], list[_Named]]:
    """Return the runs of each backbone and data set."""
    groups: dict[tuple[str, str], list[_Named]] = {}
    for member in named:
        groups.setdefault((member.names.backbone, member.names.dataset), []).append(member)
    return groups


def common_budgets(runs: Sequence[FinishedRun], options: ReportOptions, count: int = 9) -> np.ndarray:
    """Return the budgets of the options, else `count` evenly spaced ones that every run can meet.

    Raises:
        UserError: the runs have no common budget.
    """
    if options.budgets:
        return np.array([read_budget(text) for text in options.budgets])
    costs = [exit_costs(run, options.cost) for run in runs]
    low, high = max(cost[0] for cost in costs), min(cost[-1] for cost in costs)
    if low == high:  # such as networks with one exit
        return np.array([high])
    if low > high:
        raise UserError(
            f"the runs of {json.loads(runs[0].identity['backbone'])} on {json.loads(runs[0].identity['dataset'])} have "
            f"no common budget: a first exit costs {low}, a last exit {high}; expected no first exit to cost more than "
            "any last exit"
        )
    return np.linspace(low, high, count + 2)[1:-1]


def _group_tables(
    members: Sequence[_Named], measures: Mapping[str, Measured], options: ReportOptions
) -> dict[str, pd.DataFrame]:
    parts: dict[str, list[tuple[Mapping[str, Any], pd.DataFrame]]] = {STATIC: []}
    samples = ""
    for run, names in members:
        own = measures[run.path.name]
        labels = {"method": names.method, "seed": run.recipe.seed, **names._asdict()}
        tables = {**own.tables, "training": pd.DataFrame([run.training_cost()])}
        exit = _static_exit(run.identity)
        if exit:
            row = own.tables["anytime"].iloc[[exit - 1]]
            parts[STATIC].append((labels, row.assign(cost=row[COST_COLUMNS[options.cost]])))
            if names.method == STATIC:
                continue
        if samples and own.samples != samples:
            raise UserError(
                f"{run.path} and {members[0].run.path} were tested on different samples; evaluate both again, on the "
                "same images: exitkit evaluate RUN"
            )
        samples = own.samples
        for name, rows in tables.items():
            parts.setdefault(name, []).append((labels, rows))
    return {name: _labelled(pairs) for name, pairs in parts.items()}


def _labelled(pairs: Sequence[tuple[Mapping[str, Any], pd.DataFrame]]) -> pd.DataFrame:
    """Return tables below each other, with their labels as the first columns."""
    if not pairs:
        return pd.DataFrame()
    rows = pd.concat([table for _, table in pairs], ignore_index=True)
    sizes = [len(table) for _, table in pairs]
    names = pairs[0][0]
    columns = {name: np.repeat(np.array([labels[name] for labels, _ in pairs]), sizes) for name in names}
    labels = pd.DataFrame(
        {name: values if name == "seed" else values.astype(object) for name, values in columns.items()}
    )
    return pd.concat([labels, rows.drop(columns=list(names), errors="ignore")], axis=1)


def _policies(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return the three tables of exit policies; they are empty if none were measured."""
    if "policies" not in tables:
        empty = pd.DataFrame(columns=["method", *GROUP, "policy"])
        return dict.fromkeys(("policies", "policy_curve", "policy_differences"), empty)
    return {
        "policies": _over_seeds(tables["policies"], ["policy", "budget"]),
        "policy_curve": _over_seeds(tables["policy_curve"], ["policy", "point"]),
        "policy_differences": policy_differences(tables["policies"]),
    }


def _images(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Return the numbers of images per data set: "1,097 training, 200 validation and 500 test images of ..."."""
    texts: dict[str, dict[str, None]] = {}
    for row in rows.to_dict("records"):
        training = f"{row['training']:,} training, " if row["training"] else ""
        counts = f"{training}{row['validation']:,} validation and {row['test']:,} test images"
        texts.setdefault(row["dataset"], {})[f"{counts} of {row['classes']:,} classes"] = None
    return {dataset: list(counts) for dataset, counts in texts.items()}


def _static(rows: pd.DataFrame) -> pd.DataFrame:
    columns = [*GROUP, "exit", "cost_mean", "accuracy_mean", "accuracy_sd", "n"]
    return _over_seeds(rows, ["exit"], GROUP)[columns] if len(rows) else pd.DataFrame(columns=columns)


def _points(rows: pd.DataFrame) -> pd.DataFrame:
    keys = ["method", *GROUP, "point"]
    return rows.drop(columns="seed").groupby(keys, sort=False).mean().reset_index()


_SAME = ("method", "seed", *GROUP, "exit")
_BALANCED = ("majority", "chance", "learned")


def _balanced(rows: pd.DataFrame) -> pd.DataFrame:
    table = _over_seeds(rows, ["exit"], of="balanced")
    keys = ["method", *GROUP, "exit"]
    return table.merge(rows.groupby(keys, sort=False)[[*_BALANCED]].mean().reset_index(), on=keys)


def _recall(tables: Mapping[str, pd.DataFrame], options: ReportOptions) -> pd.DataFrame:
    """Return the recall of every class if it is requested; a summary may have it otherwise, too."""
    empty = pd.DataFrame(columns=[*_SAME, "class", "images", "recall"])
    return _over_seeds(tables["recall"] if options.classes else empty, ["class", "images", "exit"], of="recall")


def _spent(rows: pd.DataFrame | None) -> pd.DataFrame:
    keys = ["method", *GROUP, "budget"]
    if rows is None:  # summaries of earlier releases
        return pd.DataFrame(columns=[*keys, "validation", "test", "n"])
    means = {name: (name, "mean") for name in ("validation", "test")}
    table: pd.DataFrame = rows.groupby(keys, sort=False).agg(**means, n=("test", "count")).reset_index()
    return table


def _targets(rows: pd.DataFrame | None) -> pd.DataFrame:
    keys = ["method", *GROUP, "target", "unit"]
    if rows is None:
        return pd.DataFrame(columns=[*keys, "planned", "validation_cost", "cost", "accuracy_mean", "n", "reason"])
    numbers = [str(name) for name in rows if name not in (*keys, "seed", "accuracy", "reason")]
    counted = {"accuracy_mean": ("accuracy", "mean"), "accuracy_sd": ("accuracy", "std"), "n": ("accuracy", "count")}
    means = {str(name): (name, "mean") for name in numbers}
    reasons = {"reason": ("reason", lambda some: "; ".join(dict.fromkeys(text for text in some if text)))}
    columns: dict[str, Any] = {**means, **counted, **reasons}
    table: pd.DataFrame = rows.groupby(keys, sort=False).agg(**columns).reset_index()
    return table


def _risk(rows: pd.DataFrame) -> pd.DataFrame:
    table = _over_seeds(rows, [])
    counts = rows.groupby(["method", *GROUP], sort=False).agg(found=("point", "count"), drop_mean=("drop", "mean"))
    return table.merge(counts.reset_index(), on=["method", *GROUP])


def _missing(named: Sequence[_Named], labels: Sequence[Names], unfinished: Sequence[Missing]) -> pd.DataFrame:
    """Return the planned runs that are not finished, and the seeds that only other methods of the same table have."""
    pairs = zip(labels, unfinished, strict=True)
    planned = [(*names, json.loads(run.identity["seed"]), run.reason) for names, run in pairs]
    missing = pd.DataFrame(planned, columns=["method", *GROUP, "seed", "reason"])
    known = {tuple(row) for row in missing[["method", *GROUP, "seed"]].itertuples(index=False)}
    rows = []
    finished: dict[tuple[str, ...], dict[int, None]] = {}
    for run, names in named:
        finished.setdefault(tuple(names), {})[run.recipe.seed] = None
    for method, seeds in finished.items():
        if method[0] == STATIC:  # their table has the number of seeds of each
            continue
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
