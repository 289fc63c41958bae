"""From run folders to tidy tables: one row a method and exit, budget or operating point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from exitkit.benchmarks.published import published_for
from exitkit.benchmarks.statistics import area_under_curve, holm, paired_difference
from exitkit.errors import UserError
from exitkit.evaluation import (
    PAPER_SHARES,
    anytime_accuracy,
    budgeted,
    confidence,
    correct,
    exit_counts,
    share_for_budget,
)

BASELINE = "joint"
GROUP = ["backbone", "dataset"]
"""What is compared within: methods meet on the same backbone and data set only."""


class FinishedRun(Protocol):
    """What a comparison needs of a run; `exitkit.RunFolder` is one."""

    @property
    def path(self) -> Path:
        """Return the run's folder, for messages."""

    @property
    def label(self) -> str:
        """Return what the run's method is called in a table."""

    @property
    def recipe(self) -> Any:
        """Return what the run is: `backbone`, `dataset` and `seed` are read."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Return what makes the run this run, flat: a method's own fields are called `method.field`."""

    def outputs(self, part: str) -> Mapping[str, np.ndarray]:
        """Return logits [N, K, C], labels [N] and indices [N] of "validation" or "test"."""

    def costs(self) -> Sequence[Mapping[str, int]]:
        """Return one row an exit: exit (from 1), papers, macs, params."""

    def training_cost(self) -> Mapping[str, float]:
        """Return `seconds` of training, and its peak `memory_mib`."""


@dataclass(frozen=True)
class Comparison:
    """Three tidy tables, averaged over seeds.

    Accuracies are in percent, costs in multiply-adds of one image (convention `macs`; `papers` beside it), sd
    is the sample's (n - 1; NaN for one seed), n counts seeds. Methods keep the order they were given in.
    """

    anytime: pd.DataFrame
    """method, backbone, dataset, exit, papers, macs, accuracy_mean, accuracy_sd, n."""
    budgeted: pd.DataFrame
    """method, backbone, dataset, budget, cost_mean (realised on test), accuracy_mean, accuracy_sd, n."""
    curve: pd.DataFrame
    """method, backbone, dataset, point (the papers' p, 1..39), cost_mean, accuracy_mean, accuracy_sd, n."""
    differences: pd.DataFrame
    """method, backbone, dataset, baseline, measure ("exit 1", ..., "area"), mean, low, high, p, p_holm, n.

    Seed by seed against joint training (or the first method), in points of accuracy, with a 95 % t-interval; `p_holm`
    is corrected for the methods of the table. "area" is the mean height of the budgeted curve between the costs that
    the curves of all runs reach.
    """
    published: pd.DataFrame
    """method, backbone, dataset, paper, table, exit, accuracy_mean (ours), published, epochs, published_epochs, note.

    Empty where no paper has numbers for what was run.
    """
    training: pd.DataFrame
    """method, backbone, dataset, seconds_mean, seconds_sd, time_relative, memory_mib, memory_relative, n.

    Seconds of training, all epochs and phases; relative to joint training, or to the first method where that is not.
    """


def collect(runs: Iterable[FinishedRun], *, budgets: int = 9) -> Comparison:
    """Evaluate finished runs, anytime and budgeted batch, and average over seeds.

    Runs of one backbone and data set are compared with one another. Their budgets are spaced evenly between
    the costs that all of them can spend: from the dearest first exit to the cheapest last one, ends left out.
    At each budget a run gets the exit shares whose planned cost is the budget, and thresholds from its
    validation outputs.

    Args:
        runs: in the order in which the methods are to appear.
        budgets: how many budgets.

    Raises:
        UserError: no runs, a method twice with one seed, runs that cannot be compared.
    """
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault((run.recipe.backbone, run.recipe.dataset), []).append(run)
    if not groups:
        raise UserError("no finished runs to compare; expected at least one")
    parts: dict[str, list[pd.DataFrame]] = {"anytime": [], "budgeted": [], "curve": [], "training": []}
    for members in groups.values():
        _check_comparable(members)
        grid = _common_budgets(members, budgets)
        samples: np.ndarray | None = None
        for run in members:
            validation, test = run.outputs("validation"), run.outputs("test")
            indices = np.sort(test["indices"])
            if samples is not None and not np.array_equal(indices, samples):
                raise UserError(f"{run.path} and {members[0].path} were tested on different samples")
            samples = indices
            for name, rows in _measure(run, validation, test, grid).items():
                parts[name].append(rows)
    return Comparison(
        anytime=_over_seeds(parts["anytime"], ["exit", "papers", "macs"]),
        budgeted=_over_seeds(parts["budgeted"], ["budget"]),
        curve=_over_seeds(parts["curve"], ["point"]),
        differences=_differences(parts),
        published=_published(groups.values(), _over_seeds(parts["anytime"], ["exit", "papers", "macs"])),
        training=_training(pd.concat(parts["training"], ignore_index=True)),
    )


def _check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Refuse a seed that counts twice, and runs that differ in more than the method and the seed."""
    seen: dict[tuple[str, int], FinishedRun] = {}
    first_of: dict[str, FinishedRun] = {}
    for run in runs:
        twin = seen.setdefault((run.label, run.recipe.seed), run)
        if twin is not run:
            raise UserError(
                f"{twin.path} and {run.path} are both {run.label} with seed {run.recipe.seed}; "
                "expected each seed of a method once"
            )
        _check_alike(runs[0], run, ignoring=("seed", "method"))
        _check_alike(first_of.setdefault(run.label, run), run, ignoring=("seed",))


def _check_alike(one: FinishedRun, other: FinishedRun, ignoring: tuple[str, ...]) -> None:
    a, b = one.identity, other.identity
    keys = sorted(key for key in a.keys() | b.keys() if key.split(".")[0] not in ignoring and a.get(key) != b.get(key))
    if keys:
        told = ", ".join(f"{key}={a.get(key)} and {b.get(key)}" for key in keys[:3])
        raise UserError(
            f"{one.path} and {other.path} can't stand in one table: they differ in {told}; "
            "expected runs of one recipe, in a folder of their own"
        )


def _macs(run: FinishedRun) -> np.ndarray:
    return np.array([row["macs"] for row in run.costs()], dtype=np.int64)


def _common_budgets(runs: Sequence[FinishedRun], count: int) -> np.ndarray:
    low, high = max(_macs(run)[0] for run in runs), min(_macs(run)[-1] for run in runs)
    if low >= high:
        raise UserError(
            f"the runs of {runs[0].recipe.backbone} on {runs[0].recipe.dataset} have no common budget: "
            f"one's first exit costs {low} multiply-adds, one's last {high}; expected less first than last"
        )
    return np.linspace(low, high, count + 2)[1:-1]


def _measure(
    run: FinishedRun, validation: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray], grid: np.ndarray
) -> dict[str, pd.DataFrame]:
    """Return one run's rows of each table, before averaging."""
    if not len(validation["labels"]):
        raise UserError(f"{run.path} has no validation samples; expected some, to find thresholds on")
    costs = run.costs()
    macs = _macs(run)
    samples, exits = validation["logits"].shape[:2]
    shares = [*PAPER_SHARES, *share_for_budget(macs, grid)]
    result = budgeted(
        confidence(validation["logits"]),
        confidence(test["logits"]),
        correct(test["logits"], test["labels"]),
        macs,
        exit_counts(samples, exits, shares),
    )
    points = len(PAPER_SHARES)
    same = {
        "method": run.label,
        "seed": run.recipe.seed,
        "backbone": run.recipe.backbone,
        "dataset": run.recipe.dataset,
    }
    anytime: dict[str, Any] = {name: [int(row[name]) for row in costs] for name in ("exit", "papers", "macs")}
    anytime["accuracy"] = 100 * anytime_accuracy(test["logits"], test["labels"])
    cost, accuracy = result.cost, 100 * result.accuracy
    return {
        "training": pd.DataFrame([{**same, **run.training_cost()}]),
        "anytime": pd.DataFrame({**same, **anytime}),
        "budgeted": pd.DataFrame({**same, "budget": grid, "cost": cost[points:], "accuracy": accuracy[points:]}),
        "curve": pd.DataFrame(
            {**same, "point": range(1, points + 1), "cost": cost[:points], "accuracy": accuracy[:points]}
        ),
    }


def _differences(parts: Mapping[str, Sequence[pd.DataFrame]]) -> pd.DataFrame:
    anytime = pd.concat(parts["anytime"], ignore_index=True)
    anytime["measure"] = "exit " + anytime["exit"].astype(str)
    measured = [anytime[["method", "seed", *GROUP, "measure", "accuracy"]]]
    for group, rows in pd.concat(parts["curve"], ignore_index=True).groupby(GROUP, sort=False):
        runs = rows.groupby(["method", "seed"], sort=False)
        low, high = runs["cost"].min().max(), runs["cost"].max().min()
        heights = [(*run, *group, "area", area_under_curve(r["cost"], r["accuracy"], low, high)) for run, r in runs]
        measured.append(pd.DataFrame(heights, columns=measured[0].columns))
    table = []
    for group, rows in pd.concat(measured, ignore_index=True).groupby(GROUP, sort=False):
        methods = list(dict.fromkeys(rows["method"]))
        baseline = BASELINE if BASELINE in methods else methods[0]
        for measure, mine in rows.groupby("measure", sort=False):
            wide = mine.pivot(index="seed", columns="method", values="accuracy")
            found = []
            rivals = [name for name in methods if name != baseline and {name, baseline} <= set(wide.columns)]
            for method in rivals:
                pairs = wide[[method, baseline]].dropna()
                if len(pairs):
                    change = paired_difference(pairs[method], pairs[baseline])
                    found.append((method, *group, baseline, measure, *change))
            columns = ["method", *GROUP, "baseline", "measure", "mean", "low", "high", "p", "n"]
            frame = pd.DataFrame(found, columns=columns)
            frame.insert(len(columns) - 1, "p_holm", holm(frame["p"]))
            table.append(frame)
    return pd.concat(table, ignore_index=True)


def _published(groups: Iterable[Sequence[FinishedRun]], ours: pd.DataFrame) -> pd.DataFrame:
    columns = ["method", *GROUP, "paper", "table", "exit", "accuracy_mean", "published"]
    columns += ["epochs", "published_epochs", "note"]
    found = [pd.DataFrame(columns=columns)]
    for run in {run.label: run for members in groups for run in members}.values():
        theirs = published_for(run.identity).rename(columns={"accuracy": "published", "epochs": "published_epochs"})
        mine = ours[(ours["method"] == run.label) & (ours["backbone"] == run.recipe.backbone)]
        mine = mine[mine["dataset"] == run.recipe.dataset].drop(columns="accuracy_sd").assign(epochs=run.recipe.epochs)
        both = theirs.drop(columns="method").merge(mine, on=[*GROUP, "exit"])
        if len(both):
            found.append(both[columns])
    return pd.concat(found[1:] or found, ignore_index=True)


def _training(rows: pd.DataFrame) -> pd.DataFrame:
    table = (
        rows.groupby([*GROUP, "method"], sort=False)
        .agg(
            seconds_mean=("seconds", "mean"),
            seconds_sd=("seconds", "std"),
            memory_mib=("memory_mib", "mean"),
            n=("seconds", "size"),
        )
        .reset_index()
    )
    for name, measure in (("time_relative", "seconds_mean"), ("memory_relative", "memory_mib")):
        parts = [mine[measure] / _baseline(mine, measure) for _, mine in table.groupby(GROUP, sort=False)]
        table[name] = pd.concat(parts)
    order = ["seconds_mean", "seconds_sd", "time_relative", "memory_mib", "memory_relative", "n"]
    return table[["method", *GROUP, *order]]


def _baseline(rows: pd.DataFrame, measure: str) -> float:
    joint = rows[rows["method"] == BASELINE]
    return float((joint if len(joint) else rows)[measure].iloc[0])


def _over_seeds(parts: Sequence[pd.DataFrame], keys: list[str]) -> pd.DataFrame:
    rows = pd.concat(parts, ignore_index=True)
    named = {"cost_mean": ("cost", "mean")} if "cost" in rows else {}
    by = ["method", *GROUP, *keys]
    return (
        rows.groupby(by, sort=False)
        .agg(
            **named,
            accuracy_mean=("accuracy", "mean"),
            accuracy_sd=("accuracy", "std"),
            n=("accuracy", "size"),
        )
        .reset_index()
    )
