"""The narrow tables of a report, as text cells that any format can write."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from exitkit.benchmarks.report.comparison import GROUP, Comparison
from exitkit.benchmarks.report.comparisons import baseline_of
from exitkit.benchmarks.report.wide_tables import MISSING, Cell, group_name, unit_for, write_costs

SIGNIFICANCE = 0.05
_NAMED = 3  # methods of a tie that are named; more make a column too wide


@dataclass(frozen=True)
class Sheet:
    """One table of one backbone and data set.

    Attributes:
        kind: name of its file.
        title: a word or two.
        group: backbone and data set, for people.
        caption: what it shows.
        heads: of the columns.
        rows: cells; the first `left` columns are words.
    """

    kind: str
    title: str
    group: str
    caption: str
    heads: list[str]
    rows: list[list[Cell]]
    left: int = 1


def sheets(comparison: Comparison) -> list[Sheet]:
    """Return all narrow tables of a comparison, in the order in which a report shows them."""
    makers: list[tuple[pd.DataFrame, Callable[[Comparison, pd.DataFrame], Sheet]]] = [
        (comparison.verdicts, _verdicts),
        (comparison.differences, _differences),
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
    """Return a cell that is no number with a spread."""
    return Cell(str(text), "", best=False)


def number(value: float, digits: int, sign: str = "") -> str:
    """Write a number, or a dash where there is none."""
    if pd.isna(value):
        return MISSING
    return f"{round(value, digits) or 0.0:{sign}.{digits}f}"  # no minus before a zero


def _spread(mean: float, sd: float, digits: int = 2, best: bool = False) -> Cell:
    return Cell(number(mean, digits), "" if pd.isna(sd) else f"{sd:.{digits}f}", best)


def _verdicts(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    budgets = rows["budget"].dropna().unique().tolist()
    written = [f"{b:.3g}" for b in budgets] if comparison.options.cost == "latency" else write_costs(budgets)
    unit = "ms" if comparison.options.cost == "latency" else unit_for(budgets)[0] if budgets else ""
    names = {budget: f"budget {text} {unit}".rstrip() for budget, text in zip(budgets, written, strict=True)}
    table = []
    for row in rows.to_dict("records"):
        where = names.get(row["budget"], row["where"])
        lead = _spread(row["lead"], (row["high"] - row["low"]) / 2)
        tied = _tied(comparison, row) if lead.mean == "0.00" else []
        whose = ", ".join(tied) if len(tied) <= _NAMED else f"{len(tied)} methods"
        best, second = (f"{whose} (tie)", MISSING) if tied else (row["best"], row["second"])
        cells = [plain(where), Cell(best, "", best=True), plain(number(row["accuracy"], 2))]
        table.append([*cells, plain(second), lead, plain(row["verdict"])])
    caption = (
        "The best method at each exit and budget, and its lead over the second best, seed by seed, with the half width "
        "of the 95 % interval; more than noise: p < 0.05 after Holm's correction for all methods it was compared with"
    )
    if "not known" in set(rows["verdict"]):
        caption += (
            "; not known: there is one seed, or the difference is the same with all seeds, so that no interval can be "
            "computed"
        )
    heads = ["where", "best", "accuracy", "second", "lead", "more than noise?"]
    return Sheet("verdicts", "Which is best", group_name(rows), caption, heads, table)


def _tied(comparison: Comparison, row: Mapping[Hashable, Any]) -> list[str]:
    """Return the methods that are as good as the best of a row, as far as two digits tell, in the report's order."""
    at_exit = pd.isna(row["budget"])
    frame = comparison.anytime if at_exit else comparison.budgeted
    here = frame[(frame[GROUP[0]] == row[GROUP[0]]) & (frame[GROUP[1]] == row[GROUP[1]])]
    here = here[here["exit"].map("exit {}".format) == row["where"] if at_exit else here["budget"] == row["budget"]]
    level = here["method"][(here["accuracy_mean"] - row["accuracy"]).abs() < 0.005]
    return [method for method in here["method"] if method in {*level, row["best"], row["second"]}]


def cost_text(comparison: Comparison, cost: float) -> str:
    """Write one cost in the comparison's unit: "12.3 M", "1.52 ms"."""
    if comparison.options.cost == "latency":
        return f"{cost:.3g} ms"
    unit, size = unit_for([cost])
    return f"{cost / size:.3g} {unit}".strip()


def _differences(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    measures = list(dict.fromkeys(rows["measure"]))
    table = []
    for method, mine in rows.groupby("method", sort=False):
        by = mine.set_index("measure")
        cells = []
        for measure in measures:
            mean, low, high, sure = (
                (by.loc[measure, name] for name in ("mean", "low", "high", "p_holm"))
                if measure in by.index
                else (float("nan"),) * 4
            )
            starred = number(mean, 2, "+") + ("*" if sure < SIGNIFICANCE else "")
            cells.append(
                Cell(starred, "" if pd.isna(high) else f"{(high - low) / 2:.2f}", best=bool(sure < SIGNIFICANCE))
            )
        table.append([plain(method), *cells, plain(int(mine["n"].max()))])
    caption = (
        f"Difference to {rows['baseline'].iloc[0]} in points of accuracy, seed by seed, with the half width of its "
        "95 % interval; * significant at 0.05 after Holm's correction for the methods of a column; area: mean height "
        "of the budgeted curve"
    )
    return Sheet("differences", "Differences", group_name(rows), caption, ["method", *measures, "n"], table)


def _static(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    best = comparison.anytime.merge(rows[GROUP].drop_duplicates(), on=GROUP)
    best = best.loc[best.groupby("exit")["accuracy_mean"].idxmax()].set_index("exit")
    table = []
    for row in rows.sort_values("exit").to_dict("records"):
        exit, accuracy = row["exit"], row["accuracy_mean"]
        cells = [plain(cost_text(comparison, row["cost_mean"])), _spread(accuracy, row["accuracy_sd"])]
        beside = [plain(best["method"].get(exit, MISSING)), plain(number(best["accuracy_mean"].get(exit, math.nan), 2))]
        table.append([plain(f"exit {exit}"), *cells, *beside, plain(row["n"])])
    caption = (
        "Static networks: the same network cut at one exit and trained for it alone, beside the method that is most "
        "accurate at that exit"
    )
    heads = ["static network", "cost", "accuracy", "best method", "its accuracy", "n"]
    return Sheet("static", "Static networks", group_name(rows), caption, heads, table)


def _published(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    exits = sorted(rows["exit"].unique())
    keys = ["method", "paper", "table", "published_backbone", "published_dataset"]
    several = len(rows[keys[3:]].drop_duplicates()) > 1
    table = []
    for (method, paper, place, network, data), mine in rows.groupby(keys, sort=False):
        by_exit = mine.set_index("exit")
        there = f" ({network}, {data})" if several else ""
        for who, column in (("ours", "accuracy_mean"), (f"{paper}, {place}{there}", "published")):
            values = by_exit[column].groupby(level=0).first().reindex(exits)
            epochs = by_exit["epochs" if column == "accuracy_mean" else "published_epochs"].iloc[0]
            line = [plain(method), plain(who), *(plain(number(v, 2)) for v in values), plain(number(values.mean(), 2))]
            table.append([*line, plain(epochs)])
    heads = ["method", "source", *(f"exit {k}" for k in exits), "mean", "epochs"]
    return Sheet("published", "Published", group_name(rows), published_caption(rows), heads, table, left=2)


def unlike_published(rows: pd.DataFrame) -> list[str]:
    """Say in what ours is not the paper's experiment: some of "network", "data", "schedule"."""
    said = {part for text in rows["unlike"] for part in text.split(", ")}
    return [part for part in ("network", "data", "schedule") if part in said]


def published_caption(rows: pd.DataFrame) -> str:
    """Say what the table shows, and whether it is a fair comparison."""
    unlike = unlike_published(rows)
    what = " and ".join([", ".join(unlike[:-1]), unlike[-1]] if len(unlike) > 1 else unlike).upper()
    are = "ARE" if len(unlike) > 1 else "IS"
    warning = f"; OUR {what} {are} NOT THE PAPER'S, so that the two can't be compared" if unlike else ""
    if unlike != ["schedule"] and unlike:
        theirs = rows[["published_backbone", "published_dataset"]].drop_duplicates().itertuples(index=False)
        warning += f" (the paper's: {'; '.join(f'{network} on {data}' for network, data in theirs)})"
    notes = "".join(f"; {note}" for note in dict.fromkeys(rows["note"]) if note)
    return f"Ours beside the published accuracy (top-1, %){warning}{notes}"


def _risk(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    options = comparison.options
    table = []
    for row in rows.to_dict("records"):
        cells = [plain(cost_text(comparison, row["cost_mean"])), _spread(row["accuracy_mean"], row["accuracy_sd"])]
        found = plain(f"{row['found']} of {row['n']}")
        table.append([plain(row["method"]), *cells, plain(number(row["drop_mean"], 2, "+")), found])
    caption = (
        f"The cheapest operating point that loses less than {options.risk:g} point{'s' * (options.risk != 1)} of "
        f"accuracy against the full network, with certainty {options.certainty:g}: thresholds from one half of the "
        "validation images, tested on the other; where none was found, the full network stands"
    )
    heads = ["method", "cost on test", "accuracy", "lost on test", "found"]
    return Sheet("risk", "Risk control", group_name(rows), caption, heads, table)


def _calibration(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    exits = [where for where in dict.fromkeys(rows["where"]) if where.startswith("exit")]
    table = []
    for method, mine in rows.groupby("method", sort=False):
        by = mine.set_index("where")
        points = mine[mine["where"].str.startswith("point")]["error_mean"]
        cells = [_spread(by.loc[w, "error_mean"], by.loc[w, "error_sd"]) for w in exits]
        table.append([plain(method), *cells, plain(number(points.mean(), 2))])
    how = "after temperature scaling on validation" if comparison.options.calibrated else "as trained"
    caption = f"Expected calibration error (%, 15 bins) of each exit, {how}, and the mean over all operating points"
    return Sheet("calibration", "Calibration", group_name(rows), caption, ["method", *exits, "points"], table)


def _training(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    table = []
    for row in rows.to_dict("records"):
        sd = f"{row['seconds_sd']:.1f}" if row["n"] > 1 else ""
        cells = [Cell(f"{row['seconds_mean']:.1f}", sd, best=False), plain(f"{row['time_relative']:.2f}")]
        memory = [plain(f"{row['memory_mib']:.0f}"), plain(f"{row['memory_relative']:.2f}")]
        table.append([plain(row["method"]), *cells, *memory, plain(row["n"])])
    baseline = baseline_of(list(rows["method"]), comparison.options.baseline or "joint")
    caption = f"What training cost, all epochs; ratios to {baseline}"
    heads = ["method", "training (s)", "time ratio", "peak memory (MiB)", "memory ratio", "n"]
    return Sheet("training", "Training", group_name(rows), caption, heads, table)


def _missing(comparison: Comparison, rows: pd.DataFrame) -> Sheet:
    table = [[plain(row["method"]), plain(row["reason"]), plain(row["seed"])] for row in rows.to_dict("records")]
    caption = "Runs that belong into these tables and are not there"
    return Sheet("missing", "Missing", group_name(rows), caption, ["method", "why", "seed"], table, left=2)
