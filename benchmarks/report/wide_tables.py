"""The wide tables of a report: methods by exits or budgets, as text cells for all formats."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from exitkit.benchmarks.report.comparison import GROUP, NOT_TRAINED, STATIC, Comparison
from exitkit.benchmarks.report.comparisons import has_most_seeds, seeds_differ

_NEGATIVE = re.compile(r"-\d[\d.,]*\*?")
UNITS = {"G": 1e9, "M": 1e6, "K": 1e3, "": 1.0}
MISSING = "–"
CAPTIONS = {
    "anytime": "Anytime accuracy (top-1, %) of each exit, and its {cost} per image",
    "budgeted": "Budgeted-batch accuracy (top-1, %) for average budgets in {cost} per image",
}
COSTS = {"macs": "multiply-adds", "papers": "multiply-adds (the papers' count)", "latency": "milliseconds"}
"""{measure of cost: its name}."""


@dataclass(frozen=True)
class Cell:
    """An accuracy as text: `mean`, `sd` (empty for one seed), and whether it is the best of its column."""

    mean: str
    sd: str
    best: bool

    def text(self) -> str:
        """Return `97.3 ± 0.4`, or the mean alone, with a real minus sign before a negative number."""
        mean = f"−{self.mean[1:]}" if _NEGATIVE.fullmatch(self.mean) else self.mean
        return f"{mean} ± {self.sd}" if self.sd else mean


@dataclass(frozen=True)
class Wide:
    """A table with one row per method and one column per exit or budget."""

    kind: str
    """"anytime" or "budgeted"."""
    group: str
    """Backbone and data set."""
    caption: str
    heads: list[tuple[str, str]]
    """Per column: "exit 1" (or "budget"), and its cost in `unit`, such as "0.12"."""
    cost: str
    """Name of the cost: "multiply-adds", "milliseconds"."""
    unit: str
    """" M", " K", ...: unit of the costs."""
    cells: dict[str, list[Cell]]
    """Per method: one cell per column."""
    seeds: dict[str, int]
    """Per method: number of seeds."""
    missing: dict[str, int]
    """Per method with a row and missing seeds: their number."""

    def count(self, name: str) -> str:
        """Return the number of seeds of a method, such as "2", or "1/2" if one of two is missing."""
        gaps = self.missing.get(name, 0)
        return f"{self.seeds[name]}/{self.seeds[name] + gaps}" if gaps else str(self.seeds[name])


def unit_for(costs: Iterable[float], *, in_time: bool = False) -> tuple[str, float]:
    """Return the unit ("K", "M", "G") for these multiply-adds, and its size; in time, the unit is "ms"."""
    if in_time:
        return "ms", 1.0
    amounts = list(costs)
    least, most = min(amounts, default=0.0), max(amounts, default=0.0)
    # The smallest determines the unit, unless the largest would have five digits before its point.
    fit = ((name, size) for name, size in UNITS.items() if least >= size / 10 or most >= size * 10)
    return next(fit, ("", 1.0))


def write_costs(costs: Sequence[float], *, in_time: bool = False) -> list[str]:
    """Return costs as text in one common unit, without the unit, with enough decimals to differ."""
    _, size = unit_for(costs, in_time=in_time)
    scaled = [cost / size for cost in costs]
    least = min(scaled, default=0.0)
    if in_time:  # three digits of the least
        decimals = max(2 - math.floor(math.log10(least)), 0) if least > 0 else 2
    else:
        decimals = 0 if size == 1 or least >= 100 else 1 if least >= 10 else 2
    for digits in range(decimals, decimals + 4):
        texts = [f"{value:.{digits}f}" for value in scaled]
        if len(set(texts)) == len(set(scaled)) and (not least or float(f"{least:.{digits}f}")):
            break
    return texts


def wide_tables(comparison: Comparison, kind: str) -> list[Wide]:
    """Return the "anytime" or "budgeted" table of each backbone and data set."""
    frame = comparison.anytime if kind == "anytime" else comparison.budgeted
    decimals = {group: _decimals(rows["accuracy_sd"]) for group, rows in comparison.anytime.groupby(GROUP)}
    return [_wide(kind, rows, decimals[group], comparison) for group, rows in frame.groupby(GROUP, sort=False)]


def _decimals(sds: pd.Series) -> int:
    """Return 1 if the median sd is at least half a percent (further digits would be noise), else 2."""
    return 1 if sds.median() >= 0.5 else 2


def seed_count(seeds: Collection[int]) -> str:
    """Return the number of seeds as text, from one count per method: "2 seeds", "1 to 3 seeds"."""
    least, most = min(seeds), max(seeds)
    return f"{least if least == most else f'{least} to {most}'} seed{'s' if most > 1 else ''}"


def group_name(rows: pd.DataFrame) -> str:
    """Return "backbone on dataset" for the rows of one group."""
    return f"{rows['backbone'].iloc[0]} on {rows['dataset'].iloc[0]}"


def _wide(kind: str, rows: pd.DataFrame, decimals: int, comparison: Comparison) -> Wide:
    across = "exit" if kind == "anytime" else "budget"
    methods = list(dict.fromkeys(rows["method"]))
    means = rows.pivot(index="method", columns=across, values="accuracy_mean").loc[methods]
    sds = rows.pivot(index="method", columns=across, values="accuracy_sd").loc[methods]
    seeds = {str(method): int(n) for method, n in rows.groupby("method", sort=False)["n"].max().items()}
    heads, unit = _heads(rows, across, comparison)
    missing, waiting = _gaps(comparison.missing.merge(rows[GROUP].drop_duplicates(), on=GROUP), seeds)
    most = max(seeds.values())
    rows = rows.assign(complete=has_most_seeds(rows, across))
    complete = rows.pivot(index="method", columns=across, values="complete").loc[methods].eq(True)  # else False or NaN
    cells = _cells(means, sds, decimals, complete)
    among = " among the methods with the most seeds" if seeds_differ(rows) else ""
    for name in missing:  # a method without a finished run has a row if a run failed
        cells.setdefault(name, [Cell(MISSING, "", best=False)] * len(heads))
        seeds.setdefault(name, 0)
    over = f", mean ± sd over {seed_count(seeds.values())}" if most > 1 else ""
    title = CAPTIONS[kind].format(cost=COSTS[comparison.options.cost])
    named = ", ".join(f"{name} ({n} of {n + seeds[name]})" for name, n in missing.items())
    note = f" Missing: {named}." * bool(missing)
    further = "1 further method is" if waiting == 1 else f"{waiting} further methods are"
    note += f" {further} not trained yet (table Missing)." * bool(waiting)
    return Wide(
        kind=kind,
        group=group_name(rows),
        caption=f"{title}: {group_name(rows)}{over}. The best values of each column{among} are bold.{note}",
        heads=heads,
        cost=COSTS[comparison.options.cost],
        unit=unit,
        cells=cells,
        seeds=seeds,
        missing=missing,
    )


def _gaps(gaps: pd.DataFrame, seeds: Collection[str]) -> tuple[dict[str, int], int]:
    """Return the number of missing runs of each method with a row, and the number of methods that are not trained yet.

    Args:
        gaps: the missing runs of one backbone and data set.
        seeds: the methods with finished runs.
    """
    missing, waiting = {}, 0
    for method, rows in gaps[gaps["method"] != STATIC].groupby("method", sort=False):
        if method not in seeds and set(rows["reason"]) == {NOT_TRAINED}:
            waiting += 1
        else:
            missing[str(method)] = len(rows)
    return missing, waiting


def _cells(means: pd.DataFrame, sds: pd.DataFrame, decimals: int, complete: pd.DataFrame) -> dict[str, list[Cell]]:
    """Return the cells; the complete ones with the text of the best of these in their column are marked as best."""

    def text(value: float, missing: str) -> str:
        return missing if np.isnan(value) else f"{value:.{decimals}f}"

    best = [text(value, MISSING) for value in means.where(complete).max(axis=0)]
    cells: dict[str, list[Cell]] = {}
    rows = zip(means.index, means.to_numpy(), sds.to_numpy(), complete.to_numpy(), strict=True)
    for method, mean, sd, can_be_best in rows:
        shown = [text(value, MISSING) for value in mean]
        spread = [text(value, "") for value in sd]
        cells[str(method)] = [
            Cell(m, s, best=bool(can_be) and m == top != MISSING)
            for m, s, top, can_be in zip(shown, spread, best, can_be_best, strict=True)
        ]
    return cells


def _heads(rows: pd.DataFrame, across: str, comparison: Comparison) -> tuple[list[tuple[str, str]], str]:
    cost = comparison.cost_column if across == "exit" else "budget"
    span = rows.groupby(across)[cost].agg(["min", "max"])
    values = sorted({*span["min"], *span["max"]})
    in_time = comparison.options.cost == "latency"
    unit, written = unit_for(values, in_time=in_time)[0], write_costs(values, in_time=in_time)
    texts = dict(zip(values, written, strict=True))
    heads = []
    for k, low, high in span.itertuples():
        # A method may change the cost of an exit (ISC); the header is then a range.
        amount = texts[low] if low == high else f"{texts[low]}–{texts[high]}"
        heads.append((f"exit {k}" if across == "exit" else "budget", amount))
    return heads, f" {unit}".rstrip()
