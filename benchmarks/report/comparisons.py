"""Runs set beside one another: differences to a baseline, training time, sizes stitched into one curve, papers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from exitkit.benchmarks import published
from exitkit.benchmarks.report.statistics import area_under_curve, holm, paired_difference
from exitkit.errors import UserError
from exitkit.inference.operating_points import stitched
from exitkit.plugins import load, underlying

if TYPE_CHECKING:
    from exitkit.benchmarks.report.comparison import Context

GROUP = ["backbone", "dataset"]
BUDGETS = 39
"""How many budgets a stitched curve is drawn at."""


def differences(anytime: pd.DataFrame, curve: pd.DataFrame, wanted: str) -> pd.DataFrame:
    """Compare every method with the baseline, seed by seed; see `Comparison.differences`."""
    anytime = anytime.assign(measure="exit " + anytime["exit"].astype(str))
    columns = ["method", "seed", *GROUP, "measure", "accuracy"]
    measured = [anytime[columns]]
    for group, rows in curve.groupby(GROUP, sort=False):
        runs = rows.groupby(["method", "seed"], sort=False)
        low, high = runs["cost"].min().max(), runs["cost"].max().min()
        heights = [(*run, *group, "area", area_under_curve(r["cost"], r["accuracy"], low, high)) for run, r in runs]
        measured.append(pd.DataFrame(heights, columns=columns))
    table = []
    for group, rows in pd.concat(measured, ignore_index=True).groupby(GROUP, sort=False):
        methods = list(dict.fromkeys(rows["method"]))
        baseline = baseline_of(methods, wanted)
        for measure, mine in rows.groupby("measure", sort=False):
            wide = mine.pivot(index="seed", columns="method", values="accuracy")
            found = []
            for method in methods:
                if method == baseline or not {method, baseline} <= set(wide.columns):
                    continue
                pairs = wide[[method, baseline]].dropna()
                if len(pairs):
                    change = paired_difference(pairs[method], pairs[baseline])
                    found.append((method, *group, baseline, measure, *change))
            names = ["method", *GROUP, "baseline", "measure", "mean", "low", "high", "p", "n"]
            frame = pd.DataFrame(found, columns=names)
            frame.insert(len(names) - 1, "p_holm", holm(frame["p"]))
            table.append(frame)
    return pd.concat(table, ignore_index=True)


def verdicts(anytime: pd.DataFrame, budgeted: pd.DataFrame) -> pd.DataFrame:
    """Say which method is best at each exit and budget, and whether its lead is more than noise.

    The best is compared with every other method by Student's t on the seeds that both have; Holm's correction is for
    all of these comparisons at one place.
    """
    exits = anytime.assign(where="exit " + anytime["exit"].astype(str), budget=np.nan, place=anytime["exit"])
    spent = budgeted.assign(where="budget " + budgeted["budget"].map("{:.6g}".format), place=1000 + budgeted["budget"])
    columns = ["method", "seed", *GROUP, "where", "budget", "place", "accuracy"]
    found = []
    both = pd.concat([exits[columns], spent[columns]], ignore_index=True)
    for group, rows in both.groupby(GROUP, sort=False):
        if rows["method"].nunique() < 2:
            continue
        for _, mine in rows.groupby("place"):
            first = mine.iloc[0]
            order = list(dict.fromkeys(mine["method"]))
            wide = mine.pivot(index="seed", columns="method", values="accuracy")[order]
            ranked = wide.mean().sort_values(ascending=False, kind="stable").dropna()
            if len(ranked) < 2:
                continue
            best, second = ranked.index[0], ranked.index[1]
            pairs = {name: wide[[best, name]].dropna() for name in ranked.index[1:]}
            tests = {name: paired_difference(p[best], p[name]) for name, p in pairs.items() if len(p)}
            corrected = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
            lead, p = tests.get(second), corrected.get(second, np.nan)
            verdict = "not known" if np.isnan(p) else "yes" if p < 0.05 else "no"
            change = (lead.mean, lead.low, lead.high) if lead else (np.nan,) * 3
            line = (*group, first["where"], first["budget"], best, ranked.iloc[0], second, *change, p, verdict)
            found.append(line)
    names = [*GROUP, "where", "budget", "best", "accuracy", "second", "lead", "low", "high", "p_holm", "verdict"]
    return pd.DataFrame(found, columns=names)


def baseline_of(methods: list[str], wanted: str) -> str:
    """Return the baseline among the labels of one table: the method wanted, with fields or without, or the first."""
    exact = [name for name in methods if name == wanted]
    alike = [name for name in methods if name.split(" ")[0] == wanted]
    return (exact or alike or methods)[0]


def stitch(rows: pd.DataFrame) -> pd.DataFrame:
    """Make one curve of each method's networks on one data set, seed by seed, chosen on validation.

    At each of 39 budgets between the cheapest and the dearest operating point on validation, the point is taken that
    is the most accurate on validation of those within the budget. Only networks of one family (MSDNets, RANets, ...)
    are stitched; methods with one network only have no rows.

    Args:
        rows: method, seed, backbone, dataset, validation_cost, validation_accuracy, cost, accuracy of every point.
    """
    columns = ["method", "seed", "family", "dataset", "budget", "cost", "accuracy"]
    found = [pd.DataFrame(columns=columns)]
    rows = rows.assign(family=rows["backbone"].map(family))
    for (kind, dataset), here in rows.groupby(["family", "dataset"], sort=False):
        if here["backbone"].nunique() < 2:
            continue
        each = here.groupby(["method", "seed"], sort=False)
        low, high = each["validation_cost"].min().max(), each["validation_cost"].max().min()
        budgets = np.geomspace(low, high, BUDGETS)
        for (method, seed), mine in each:
            if mine["backbone"].nunique() < 2:
                continue
            chosen = mine.iloc[stitched(mine["validation_cost"], mine["validation_accuracy"])]
            place = np.searchsorted(chosen["validation_cost"], budgets * (1 + 1e-12), side="right") - 1
            at = chosen.iloc[place]
            same = {"method": method, "seed": seed, "family": kind, "dataset": dataset, "budget": budgets}
            found.append(pd.DataFrame({**same, "cost": at["cost"].to_numpy(), "accuracy": at["accuracy"].to_numpy()}))
    return pd.concat(found[1:] or found, ignore_index=True)


def family(backbone: str) -> str:
    """Return the kind of network that a backbone, as it is called in a table, is of: "msdnet"."""
    name = backbone.split(" ")[0]
    try:
        return str(underlying(load("backbone", name)).__name__).lower()
    except UserError:  # one of a package that is not installed here
        return name.split("-")[0]


def published_beside(named: Iterable[Any], ours: pd.DataFrame, context: Context) -> pd.DataFrame:
    """Set the papers' accuracies beside ours; see `Comparison.published`."""
    columns = ["method", *GROUP, "paper", "table", "exit", "accuracy_mean", "published", "epochs", "published_epochs"]
    columns += ["batch_size", "published_batch_size", "published_backbone", "published_dataset", "unlike", "note"]
    found = [pd.DataFrame(columns=columns)]
    for run, names in {names: (run, names) for run, names in named}.values():
        theirs = published.published_for(run.identity, context.stands_for.get(run.path.name, {}), context.published)
        rows = cast("list[dict[str, Any]]", theirs.to_dict("records"))
        theirs = theirs.assign(unlike=[published.unlike(run.identity, row, run.recipe) for row in rows])
        theirs = theirs.rename(columns={"accuracy": "published"})
        theirs = theirs.rename(columns={c: f"published_{c}" for c in ("epochs", "batch_size", "backbone", "dataset")})
        mine = ours[(ours["method"] == names.method) & (ours["backbone"] == names.backbone)]
        mine = mine[mine["dataset"] == names.dataset].drop(columns="accuracy_sd")
        mine = mine.assign(epochs=run.recipe.epochs, batch_size=run.recipe.batch_size)
        both = theirs.drop(columns="method").merge(mine, on="exit")
        if len(both):
            found.append(both[columns])
    return pd.concat(found[1:] or found, ignore_index=True)


def training(rows: pd.DataFrame, wanted: str) -> pd.DataFrame:
    """Average what training cost; see `Comparison.training`."""
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
        for _, mine in table.groupby(GROUP, sort=False):
            baseline = mine.loc[mine["method"] == baseline_of(list(mine["method"]), wanted), measure]
            parts.append(mine[measure] / float(baseline.iloc[0]))
        table[name] = pd.concat(parts)
    order = ["seconds_mean", "seconds_sd", "time_relative", "memory_mib", "memory_relative", "n"]
    return table[["method", *GROUP, *order]]
