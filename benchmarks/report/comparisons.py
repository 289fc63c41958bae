"""Comparisons of runs: differences to a baseline, best methods, stitched curves, published results, training cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from exitkit.benchmarks import published
from exitkit.benchmarks.report.statistics import SIGNIFICANCE, area_under_curve, holm, paired_difference
from exitkit.errors import UserError
from exitkit.inference.operating_points import stitched
from exitkit.plugins import load, underlying

if TYPE_CHECKING:
    from exitkit.benchmarks.report.comparison import Context

GROUP = ["backbone", "dataset"]
BUDGETS = 39
"""Number of budgets of a stitched curve."""


def differences(anytime: pd.DataFrame, curve: pd.DataFrame, wanted: str) -> pd.DataFrame:
    """Compare every method with the baseline, paired by seed; see `Comparison.differences`."""
    anytime = anytime.assign(measure="exit " + anytime["exit"].astype(str))
    columns = ["method", "seed", *GROUP, "measure", "accuracy"]
    measured = [anytime[columns]]
    for group, rows in curve.groupby(GROUP, sort=False):
        heights = [(*run, *group, "area", height) for run, height in _areas(rows).items()]
        measured.append(pd.DataFrame(heights, columns=columns))
    table = []
    for group, rows in pd.concat(measured, ignore_index=True).groupby(GROUP, sort=False):
        methods = list(dict.fromkeys(rows["method"]))
        baseline = baseline_of(methods, wanted)
        for measure, values in rows.groupby("measure", sort=False):
            wide = values.pivot(index="seed", columns="method", values="accuracy")
            compared = []
            for method in methods:
                if method == baseline or not {method, baseline} <= set(wide.columns):
                    continue
                pairs = wide[[method, baseline]].dropna()
                if len(pairs):
                    change = paired_difference(pairs[method], pairs[baseline])
                    compared.append((method, *group, baseline, measure, *change))
            names = ["method", *GROUP, "baseline", "measure", "mean", "low", "high", "p", "n"]
            frame = pd.DataFrame(compared, columns=names)
            frame.insert(len(names) - 1, "p_holm", holm(frame["p"]))
            table.append(frame)
    return pd.concat(table, ignore_index=True)


def _areas(rows: pd.DataFrame) -> dict[Any, float]:
    """Return the area under the budgeted curve of each run, {(method, seed): area}, over the costs that all reach.

    The curve of a collapsed run, whose images all leave at one exit, is one point: it does not limit the range of the
    others, and its area is its accuracy.
    """
    runs = rows.groupby(["method", "seed"], sort=False)
    least, most = runs["cost"].min(), runs["cost"].max()
    curves = least < most
    low, high = least[curves].max(), most[curves].min()
    areas = {}
    for run, points in runs:
        cost, accuracy = points["cost"], points["accuracy"]
        is_curve = cost.min() < cost.max()
        areas[run] = area_under_curve(cost, accuracy, low, high) if is_curve else float(accuracy.max())
    return areas


def policy_differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Compare every policy with plain confidence on the same runs; see `Comparison.policy_differences`.

    A policy is compared at the budgets at which it has an operating point for every seed.

    Args:
        rows: method, seed, backbone, dataset, policy, budget, accuracy.
    """
    names = ["method", *GROUP, "policy", "budgets", "mean", "low", "high", "p", "n"]
    table = []
    for method, group in rows.groupby(["method", *GROUP], sort=False):
        wide = group.pivot(index=["seed", "budget"], columns="policy", values="accuracy")
        for policy in dict.fromkeys(group["policy"]):
            changes = (wide[policy] - wide["confidence"]).unstack("budget").dropna(axis="columns")
            if policy != "confidence" and changes.size:
                change = changes.mean(axis="columns")
                table.append((*method, policy, changes.shape[1], *paired_difference(change, np.zeros(len(change)))))
    frame = pd.DataFrame(table, columns=names)
    frame.insert(len(names) - 1, "p_holm", np.nan)
    for _, places in frame.groupby(GROUP, sort=False).groups.items():
        frame.loc[places, "p_holm"] = holm(frame.loc[places, "p"])
    return frame


def verdicts(anytime: pd.DataFrame, budgeted: pd.DataFrame) -> pd.DataFrame:
    """Return the best method at each exit and budget, and whether its lead is significant.

    The best method is compared with every other one by Student's paired t-test on their common seeds; Holm's correction
    is for all of these comparisons at one exit or budget. A method with fewer seeds than another one is not compared.
    The columns are those of `Comparison.verdicts`.
    """
    exits = anytime.assign(where="exit " + anytime["exit"].astype(str), budget=np.nan, place=anytime["exit"])
    spent = budgeted.assign(where="budget " + budgeted["budget"].map("{:.6g}".format), place=1000 + budgeted["budget"])
    columns = ["method", "seed", *GROUP, "where", "budget", "place", "accuracy"]
    lines = []
    both = pd.concat([exits[columns], spent[columns]], ignore_index=True)
    both["n"] = both.groupby([*GROUP, "place", "method"])["accuracy"].transform("count")
    for group, rows in both.groupby(GROUP, sort=False):
        if rows["method"].nunique() < 2:
            continue
        for _, values in rows[has_most_seeds(rows, "place")].groupby("place"):
            first = values.iloc[0]
            order = list(dict.fromkeys(values["method"]))
            wide = values.pivot(index="seed", columns="method", values="accuracy")[order]
            ranked = wide.mean().sort_values(ascending=False, kind="stable").dropna()
            if len(ranked) < 2:
                continue
            best, second = ranked.index[0], ranked.index[1]
            pairs = {name: wide[[best, name]].dropna() for name in ranked.index[1:]}
            tests = {name: paired_difference(p[best], p[name]) for name, p in pairs.items() if len(p)}
            corrected = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
            lead, p = tests.get(second), corrected.get(second, np.nan)
            verdict = "not known" if np.isnan(p) else "yes" if p < SIGNIFICANCE and lead and lead.mean > 0 else "no"
            change = (lead.mean, lead.low, lead.high) if lead else (np.nan,) * 3
            line = (*group, first["where"], first["budget"], best, ranked.iloc[0], second, *change, p, verdict)
            lines.append(line)
    names = [*GROUP, "where", "budget", "best", "accuracy", "second", "lead", "low", "high", "p_holm", "verdict"]
    return pd.DataFrame(lines, columns=names)


def has_most_seeds(rows: pd.DataFrame, column: str) -> pd.Series:
    """Return whether each row has as many seeds (`n`) as any row of its exit or budget.

    Only such rows can be the best of a table: the mean of fewer seeds can be high by chance.
    """
    return rows["n"] == rows.groupby(column)["n"].transform("max")


def seeds_differ(rows: pd.DataFrame) -> bool:
    """Return whether some rows do not have the most seeds (column `complete`, made by `has_most_seeds`).

    A method without an operating point at a budget has no value there, and no seeds: such rows do not count.
    """
    return not rows.loc[rows["n"] > 0, "complete"].all()


def baseline_of(methods: list[str], wanted: str) -> str:
    """Return the label of the baseline: `wanted`, else the first label of that method, else the first label."""
    exact = [name for name in methods if name == wanted]
    same_method = [name for name in methods if name.split(" ")[0] == wanted]
    return (exact or same_method or methods)[0]


def stitch(rows: pd.DataFrame) -> pd.DataFrame:
    """Combine the curves of a method's networks of several sizes on one data set into one curve, per seed.

    At each of 39 budgets, spaced geometrically over the validation costs that all methods and seeds reach, the curve
    has the operating point with the highest validation accuracy within the budget. Only networks of one family
    (MSDNets, RANets, ...) are combined. Methods with a single network have no rows; neither have methods whose curves
    share no cost.

    Args:
        rows: method, seed, backbone, dataset, validation_cost, validation_accuracy, cost, accuracy of every point.

    Returns:
        method, seed, family, dataset, budget, cost, accuracy; cost and accuracy are on test.
    """
    columns = ["method", "seed", "family", "dataset", "budget", "cost", "accuracy"]
    curves = [pd.DataFrame(columns=columns)]
    rows = rows.assign(family=rows["backbone"].map(family))
    for (kind, dataset), group in rows.groupby(["family", "dataset"], sort=False):
        networks = group.groupby(["method", "seed"])["backbone"].transform("nunique")
        runs = group[networks > 1].groupby(["method", "seed"], sort=False)
        low, high = runs["validation_cost"].min().max(), runs["validation_cost"].max().min()
        if not low < high:  # no method has several networks, or their costs do not overlap
            continue
        budgets = np.geomspace(low, high, BUDGETS)
        for (method, seed), points in runs:
            chosen = points.iloc[stitched(points["validation_cost"], points["validation_accuracy"])]
            index = np.searchsorted(chosen["validation_cost"], budgets * (1 + 1e-12), side="right") - 1
            at = chosen.iloc[index]
            same = {"method": method, "seed": seed, "family": kind, "dataset": dataset, "budget": budgets}
            curves.append(pd.DataFrame({**same, "cost": at["cost"].to_numpy(), "accuracy": at["accuracy"].to_numpy()}))
    return pd.concat(curves[1:] or curves, ignore_index=True)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as dictionaries {column: value}."""
    return cast("list[dict[str, Any]]", frame.to_dict("records"))


def family(backbone: str) -> str:
    """Return the family of a backbone, such as "msdnet", from its label in a table."""
    name = backbone.split(" ")[0]
    try:
        return str(underlying(load("backbone", name)).__name__).lower()
    except UserError:  # its package is not installed
        return name.split("-")[0]


def published_beside(named: Iterable[Any], ours: pd.DataFrame, context: Context) -> pd.DataFrame:
    """Join the papers' accuracies with ours; see `Comparison.published`."""
    columns = ["method", *GROUP, "paper", "table", "exit", "accuracy_mean", "published", "epochs", "published_epochs"]
    columns += ["batch_size", "published_batch_size", "published_backbone", "published_dataset", "unlike", "note"]
    tables = [pd.DataFrame(columns=columns)]
    for run, names in {names: (run, names) for run, names in named}.values():
        reference = published.published_for(run.identity, context.stands_for.get(run.path.name, {}), context.published)
        rows = records(reference)
        reference = reference.assign(unlike=[published.unlike(run.identity, row, run.recipe) for row in rows])
        reference = reference.rename(columns={"accuracy": "published"})
        renamed = {name: f"published_{name}" for name in ("epochs", "batch_size", "backbone", "dataset")}
        reference = reference.rename(columns=renamed)
        accuracies = ours[(ours["method"] == names.method) & (ours["backbone"] == names.backbone)]
        accuracies = accuracies[accuracies["dataset"] == names.dataset].drop(columns="accuracy_sd")
        accuracies = accuracies.assign(epochs=run.recipe.epochs, batch_size=run.recipe.batch_size)
        both = reference.drop(columns="method").merge(accuracies, on="exit")
        if len(both):
            tables.append(both[columns])
    return pd.concat(tables[1:] or tables, ignore_index=True)


def training(rows: pd.DataFrame, wanted: str) -> pd.DataFrame:
    """Average the training time and peak memory; see `Comparison.training`."""
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
        parts = []
        for _, group in table.groupby(GROUP, sort=False):
            baseline = group.loc[group["method"] == baseline_of(list(group["method"]), wanted), measure]
            parts.append(group[measure] / float(baseline.iloc[0]))
        table[name] = pd.concat(parts)
    order = ["seconds_mean", "seconds_sd", "time_relative", "memory_mib", "memory_relative", "n"]
    return table[["method", *GROUP, *order]]
