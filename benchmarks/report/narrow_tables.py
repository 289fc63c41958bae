"""The narrow tables of a report, as text cells for all formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from exitkit.benchmarks.report.comparison import GROUP, Comparison
from exitkit.benchmarks.report.comparisons import baseline_of, has_most_seeds, seeds_differ
from exitkit.benchmarks.report.statistics import SIGNIFICANCE
from exitkit.benchmarks.report.wide_tables import MISSING, Cell, group_name, unit_for, write_costs

TITLES = {
    "anytime": "Anytime accuracy",
    "budgeted": "Budgeted-batch accuracy",
    "balanced": "Balanced accuracy",
    "recall": "Recall per class",
    "verdicts": "Best methods",
    "differences": "Differences",
    "policies": "Exit policies",
    "spent": "Realised costs",
    "targets": "Operating points",
    "static": "Static networks",
    "published": "Published",
    "risk": "Risk control",
    "calibration": "Calibration",
    "training": "Training",
    "missing": "Missing",
}
"""{kind of table: its title in all formats}"""
_NAMED = 3  # largest number of tied methods that are listed by name


@dataclass(frozen=True)
class Sheet:
    """One table of one backbone and data set.

    Attributes:
        kind: name of the file.
        group: backbone and data set.
        caption: caption of the table.
        heads: column headers.
        rows: cells; the first `left` columns are left-aligned text.
    """

    kind: str
    group: str
    caption: str
    heads: list[str]
    rows: list[list[Cell]]
    left: int = 1

    @property
    def title(self) -> str:
        """Title of the table."""
        return TITLES[self.kind]


def sheets(comparison: Comparison) -> list[Sheet]:
    """Return all narrow tables of a comparison, in the order of the report."""
    makers: list[tuple[pd.DataFrame, Callable[[Comparison, pd.DataFrame], Sheet]]] = [
        (comparison.balanced, _balanced),
        (comparison.recall, _recall),
        (comparison.verdicts, _verdicts),
        (comparison.spent, _spent),
        (comparison.differences, _differences),
        (comparison.policies, _policies),
        (comparison.targets, _targets),
        (comparison.static, _static),
        (comparison.published, _published),
        (comparison.risk, _risk),
        (comparison.calibration, _calibration),
        (comparison.training, _training),
        (comparison.missing, _missing),
    ]
    return [
        make(comparison, rows) for frame, make in makers for _, rows in frame.groupby(GROUP, sort=False) if len(rows)
    ]


def plain(text: object) -> Cell:
    """Return a cell without a standard deviation."""
    return Cell(str(text), "", best=False)


def number(value: float, digits: int, sign: str = "") -> str:
    """Return a number as text; a dash for NaN."""
    if pd.isna(value):
        return MISSING
    return f"{round(value, digits) or 0.0:{sign}.{digits}f}"  # no minus sign before zero


def _spread(mean: float, sd: float, digits: int = 2, best: bool = False) -> Cell:
    return Cell(number(mean, digits), "" if pd.isna(sd) else f"{sd:.{digits}f}", best)


def _balanced(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    exits = sorted(rows["exit"].unique())
    rows = rows.assign(complete=has_most_seeds(rows, "exit"))
    best = {exit: number(some["balanced_mean"].max(), 2) for exit, some in rows[rows["complete"]].groupby("exit")}
    table = []
    for method, group in rows.groupby("method", sort=False):
        by_exit = group.set_index("exit").reindex(exits)
        cells = []
        for exit, row in zip(exits, by_exit.to_dict("records"), strict=True):
            cell = _spread(row["balanced_mean"], row["balanced_sd"])
            cells.append(replace(cell, best=cell.mean == best[exit] != MISSING and row["complete"]))
        table.append([plain(method), *cells, plain(int(group["n"].max()))])
    caption = (
        "Balanced accuracy (%) of each exit: the mean recall of the classes. Always answering the most frequent class "
        f"has an accuracy of {number(rows['majority'].mean(), 2)} % and a balanced accuracy of "
        f"{number(rows['chance'].mean(), 2)} %{_among(rows)}"
    )
    heads = ["method", *(f"exit {k}" for k in exits), "n"]
    return Sheet("balanced", group_name(rows), caption, heads, table)


def _among(rows: pd.DataFrame) -> str:
    """Return the end of a caption: which rows can be the best if they have different numbers of seeds."""
    return "; best values among those with the most seeds" if seeds_differ(rows) else ""


def _recall(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    methods = list(dict.fromkeys(rows["method"]))
    last = rows.loc[rows.groupby("method")["exit"].transform("max") == rows["exit"]]
    wide = last.pivot_table(index=["class", "images"], columns="method", values="recall_mean", sort=False)[methods]
    wide = wide.loc[wide.mean(axis=1).sort_values(kind="stable").index]
    table = [
        [plain(name), plain(f"{images:,}"), *(plain(number(value, 2)) for value in values)]
        for (name, images), values in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    caption = "Recall (%) of each class at the last exit, with the lowest first"
    return Sheet("recall", group_name(rows), caption, ["class", "images", *methods], table)


def _verdicts(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    budgets = rows["budget"].dropna().unique().tolist()
    in_time = comparison.options.cost == "latency"
    unit, written = unit_for(budgets, in_time=in_time)[0], write_costs(budgets, in_time=in_time)
    names = {budget: f"budget {text} {unit}".rstrip() for budget, text in zip(budgets, written, strict=True)}
    anytime = comparison.anytime.merge(rows[GROUP].drop_duplicates(), on=GROUP)
    seeds = anytime.groupby("method")["n"].max().tolist()
    table = []
    for row in rows.to_dict("records"):
        where = names.get(row["budget"], row["where"])
        lead = _spread(row["lead"], (row["high"] - row["low"]) / 2)
        tied = _tied(comparison, row) if lead.mean == "0.00" else []
        names_of_tie = ", ".join(tied) if len(tied) <= _NAMED else f"{len(tied)} methods"
        best, second = (f"{names_of_tie} (tie)", MISSING) if tied else (row["best"], row["second"])
        cells = [plain(where), Cell(best, "", best=True), plain(number(row["accuracy"], 2))]
        table.append([*cells, plain(second), lead, plain(row["verdict"])])
    caption = (
        "The best method at each exit and budget, and its lead over the second best: mean difference paired by seed, "
        "with the half width of its 95 % interval; more than noise: p < 0.05 after Holm's correction for the "
        "comparisons with all other methods"
    )
    if len(set(seeds)) > 1:
        caption += "; methods with fewer seeds than others are left out"
    if "not known" in set(rows["verdict"]):
        caption += (
            "; not known: no interval can be computed, because there is one seed or the difference is the same for all "
            "seeds"
        )
    heads = ["where", "best", "accuracy", "second", "lead", "more than noise?"]
    return Sheet("verdicts", group_name(rows), caption, heads, table)


def _tied(comparison: Comparison, row: Mapping[Hashable, Any]) -> list[str]:
    """Return the methods whose accuracy equals the best of a row to two digits, in the order of the report."""
    at_exit = pd.isna(row["budget"])
    frame = comparison.anytime if at_exit else comparison.budgeted
    rows = frame[(frame[GROUP[0]] == row[GROUP[0]]) & (frame[GROUP[1]] == row[GROUP[1]])]
    rows = rows[rows["exit"].map("exit {}".format) == row["where"] if at_exit else rows["budget"] == row["budget"]]
    rows = rows[has_most_seeds(rows, "exit" if at_exit else "budget")]
    tied = rows["method"][(rows["accuracy_mean"] - row["accuracy"]).abs() < 0.005]
    return [method for method in rows["method"] if method in {*tied, row["best"], row["second"]}]


def cost_text(comparison: Comparison, cost: float) -> str:
    """Return a cost as text in the unit of the comparison: "12.3 M", "1.52 ms"."""
    if comparison.options.cost == "latency":
        return f"{write_costs([cost], in_time=True)[0]} ms"
    unit, size = unit_for([cost])
    return f"{cost / size:.3g} {unit}".strip()


def _differences(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    measures = list(dict.fromkeys(rows["measure"]))
    table = []
    for method, group in rows.groupby("method", sort=False):
        by_measure = group.set_index("measure")
        cells = []
        for measure in measures:
            mean, low, high, p = (
                (by_measure.loc[measure, name] for name in ("mean", "low", "high", "p_holm"))
                if measure in by_measure.index
                else (float("nan"),) * 4
            )
            starred = number(mean, 2, "+") + ("*" if p < SIGNIFICANCE else "")
            cells.append(Cell(starred, "" if pd.isna(high) else f"{(high - low) / 2:.2f}", best=bool(p < SIGNIFICANCE)))
        table.append([plain(method), *cells, plain(int(group["n"].max()))])
    caption = (
        f"Difference to {rows['baseline'].iloc[0]} in percentage points of accuracy, paired by seed, with the half "
        "width of its 95 % interval; *: significant at 0.05 after Holm's correction for the methods of a column; area: "
        "mean height of the budgeted curve"
    )
    return Sheet("differences", group_name(rows), caption, ["method", *measures, "n"], table)


def _policies(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    budgets = rows["budget"].unique().tolist()
    in_time = comparison.options.cost == "latency"
    unit, written = unit_for(budgets, in_time=in_time)[0], write_costs(budgets, in_time=in_time)
    keys = ["method", *GROUP, "policy"]
    changes = {tuple(row[key] for key in keys): row for row in comparison.policy_differences.to_dict("records")}
    rows = rows.assign(complete=has_most_seeds(rows, "budget"))
    best = rows[rows["complete"]].groupby("budget")["accuracy_mean"].max()
    table = []
    for names, group in rows.groupby(["method", *GROUP, "policy"], sort=False):
        cells = []
        for row in group.to_dict("records"):
            mean = row["accuracy_mean"]
            is_best = row["complete"] and mean == best.get(row["budget"])
            cells.append(_spread(mean, row["accuracy_sd"], best=is_best))
        change = plain("")
        if names in changes:
            mean, low, high, p = (float(changes[names][key]) for key in ("mean", "low", "high", "p_holm"))
            text = number(mean, 2, "+") + ("*" if p < SIGNIFICANCE else "")
            change = Cell(text, number((high - low) / 2, 2).replace(MISSING, ""), best=bool(p < SIGNIFICANCE))
        method, *_, policy = names
        table.append([plain(method), plain(policy), *cells, change, plain(int(group["n"].max()))])
    caption = (
        "Accuracy of exit policies within average budgets: operating points selected on validation, cross-fitted; "
        "difference to plain confidence on the same runs, mean over the budgets at which the policy has an operating "
        "point, paired by seed, with the half width of its 95 % interval; *: significant at 0.05 after Holm's "
        "correction. `exitkit policies` compares by image"
        f"{_among(rows)}"
    )
    heads = ["method", "policy", *(f"{text} {unit}".rstrip() for text in written), "difference", "n"]
    return Sheet("policies", group_name(rows), caption, heads, table, left=2)


def _spent(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    budgets = rows["budget"].unique().tolist()
    in_time = comparison.options.cost == "latency"
    written = write_costs(budgets, in_time=in_time)
    unit, size = unit_for(budgets, in_time=in_time)
    table = []
    for method, group in rows.groupby("method", sort=False):
        by_budget = group.set_index("budget").reindex(budgets)
        for part in ("validation", "test"):
            cells = [plain(f"{cost / size:.4g}" if cost == cost else MISSING) for cost in by_budget[part]]
            table.append([plain(method), plain(part), *cells, plain(int(group["n"].max()))])
    caption = (
        "Mean cost of an image at each average budget, on the validation images, from which the thresholds are, and on "
        "the test images"
    )
    heads = ["method", "images", *(f"{text} {unit}".rstrip() for text in written), "n"]
    return Sheet("spent", group_name(rows), caption, heads, table, left=2)


def _targets(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    table = []
    shares = [name for name in rows if str(name).startswith("share_")]
    for row in rows.to_dict("records"):
        costs = [row[name] for name in ("planned", "validation_cost", "cost")]
        known = [cost for cost in costs if not pd.isna(cost)]
        unit, size = unit_for(known, in_time=row["unit"] == "latency")
        amounts = [MISSING if pd.isna(cost) else f"{cost / size:.3g} {unit}".strip() for cost in costs]

        leaving = " ".join(f"{100 * row[name]:.0f}" for name in shares if not pd.isna(row[name]))
        cells = [plain(row["target"]), *map(plain, amounts)]
        accuracies = [_spread(row["accuracy_mean"], row["accuracy_sd"]), plain(number(row["full"], 2))]
        table.append([plain(row["method"]), *cells, *accuracies, plain(leaving or MISSING), plain(row["n"])])
    reasons = [text for text in dict.fromkeys(rows["reason"]) if text]
    by = f"{'calibrated ' * comparison.options.calibrated}{comparison.options.rule}"
    caption = (
        f"Operating points that reach a target on validation, by {by}: planned mean cost, mean cost on validation "
        "and on test, accuracy of the point and of the full network on test, and the share of the test images that "
        f"leaves at each exit (%); means over seeds{'. Not reached: ' if reasons else ''}{'; '.join(reasons)}"
    )
    heads = ["method", "target", "planned", "validation", "test", "accuracy", "full", "leaving", "n"]
    return Sheet("targets", group_name(rows), caption, heads, table, left=2)


def _static(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    best = comparison.anytime.merge(rows[GROUP].drop_duplicates(), on=GROUP)
    complete = has_most_seeds(best, "exit")
    among = "" if complete.all() else " (of those with the most seeds)"
    best = best[complete]
    best = best.loc[best.groupby("exit")["accuracy_mean"].idxmax()].set_index("exit")
    table = []
    for row in rows.sort_values("exit").to_dict("records"):
        exit, accuracy = row["exit"], row["accuracy_mean"]
        cells = [plain(cost_text(comparison, row["cost_mean"])), _spread(accuracy, row["accuracy_sd"])]
        beside = [plain(best["method"].get(exit, MISSING)), plain(number(best["accuracy_mean"].get(exit, math.nan), 2))]
        table.append([plain(f"exit {exit}"), *cells, *beside, plain(row["n"])])
    caption = (
        "Static networks: the network cut at one exit and trained with this exit only, beside the most accurate method "
        f"at this exit{among}"
    )
    heads = ["static network", "cost", "accuracy", "best method", "its accuracy", "n"]
    return Sheet("static", group_name(rows), caption, heads, table)


def _published(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    exits = sorted(rows["exit"].unique())
    keys = ["method", "paper", "table", "published_backbone", "published_dataset"]
    several = len(rows[keys[3:]].drop_duplicates()) > 1
    table = []
    for (method, paper, number_of_table, network, data), group in rows.groupby(keys, sort=False):
        by_exit = group.set_index("exit")
        setting = f" ({network}, {data})" if several else ""
        for source, column in (("ours", "accuracy_mean"), (f"{paper}, {number_of_table}{setting}", "published")):
            values = by_exit[column].groupby(level=0).first().reindex(exits)
            epochs = by_exit["epochs" if column == "accuracy_mean" else "published_epochs"].iloc[0]
            line = [
                plain(method),
                plain(source),
                *(plain(number(v, 2)) for v in values),
                plain(number(values.mean(), 2)),
            ]
            table.append([*line, plain(epochs)])
    heads = ["method", "source", *(f"exit {k}" for k in exits), "mean", "epochs"]
    return Sheet("published", group_name(rows), published_caption(rows), heads, table, left=2)


def unlike_published(rows: pd.DataFrame) -> list[str]:
    """Return what differs from the paper's experiment: some of "network", "data", "schedule"."""
    differences = {part for text in rows["unlike"] for part in text.split(", ")}
    return [part for part in ("network", "data", "schedule") if part in differences]


def published_caption(rows: pd.DataFrame) -> str:
    """Return the caption of the table, with a warning if the accuracies are not comparable."""
    unlike = unlike_published(rows)
    names = " and ".join([", ".join(unlike[:-1]), unlike[-1]] if len(unlike) > 1 else unlike)
    verb = "differ" if len(unlike) > 1 else "differs"
    warning = f"; NOT COMPARABLE: our {names} {verb} from the paper's" if unlike else ""
    if unlike != ["schedule"] and unlike:
        reference = rows[["published_backbone", "published_dataset"]].drop_duplicates().itertuples(index=False)
        warning += f" (the paper's: {'; '.join(f'{network} on {data}' for network, data in reference)})"
    notes = "".join(f"; {note}" for note in dict.fromkeys(rows["note"]) if note)
    return f"Our accuracy and the published accuracy (top-1, %){warning}{notes}"


def _risk(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    options = comparison.options
    table = []
    for row in rows.to_dict("records"):
        cells = [plain(cost_text(comparison, row["cost_mean"])), _spread(row["accuracy_mean"], row["accuracy_sd"])]
        seeds = plain(f"{row['found']} of {row['n']}")
        table.append([plain(row["method"]), *cells, plain(number(row["drop_mean"], 2, "+")), seeds])
    caption = (
        f"The lowest-cost operating point that loses less than {options.risk:g} percentage "
        f"point{'s' * (options.risk != 1)} of accuracy against the full network, with confidence "
        f"{options.certainty:g}: thresholds from one half of the validation images, tested on the other half; the full "
        "network is used if no such point is found"
    )
    heads = ["method", "cost on test", "accuracy", "loss on test", "found"]
    return Sheet("risk", group_name(rows), caption, heads, table)


def _calibration(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    exits = [where for where in dict.fromkeys(rows["where"]) if where.startswith("exit")]
    table = []
    for method, group in rows.groupby("method", sort=False):
        by_exit = group.set_index("where")
        points = group[group["where"].str.startswith("point")]["error_mean"]
        cells = [_spread(by_exit.loc[exit, "error_mean"], by_exit.loc[exit, "error_sd"]) for exit in exits]
        table.append([plain(method), *cells, plain(number(points.mean(), 2))])
    how = "after temperature scaling on validation" if comparison.options.calibrated else "without temperature scaling"
    caption = f"Expected calibration error (%, 15 bins) of each exit, {how}, and the mean over all operating points"
    return Sheet("calibration", group_name(rows), caption, ["method", *exits, "points"], table)


def _training(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    table = []
    for row in rows.to_dict("records"):
        sd = f"{row['seconds_sd']:.1f}" if row["n"] > 1 else ""
        cells = [Cell(f"{row['seconds_mean']:.1f}", sd, best=False), plain(f"{row['time_relative']:.2f}")]
        memory = [plain(f"{row['memory_mib']:.0f}"), plain(f"{row['memory_relative']:.2f}")]
        table.append([plain(row["method"]), *cells, *memory, plain(row["n"])])
    baseline = baseline_of(list(rows["method"]), comparison.options.baseline or "joint")
    caption = f"Training time and peak memory, all epochs; ratios to {baseline}"
    heads = ["method", "training (s)", "time ratio", "peak memory (MiB)", "memory ratio", "n"]
    return Sheet("training", group_name(rows), caption, heads, table)


def _missing(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    table = [
        [plain(method), plain(reason), plain(", ".join(map(str, seeds)))]
        for (method, reason), seeds in rows.groupby(["method", "reason"], sort=False)["seed"]
    ]
    caption = "Runs that are missing from these tables"
    return Sheet("missing", group_name(rows), caption, ["method", "reason", "seeds"], table, left=2)
