"""The wide table of a paper, methods by exits or budgets: which text stands in which cell, in any format."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from exitkit.benchmarks.report.collect import BASELINE, GROUP, Comparison

UNITS = {"G": 1e9, "M": 1e6, "K": 1e3, "": 1.0}
MISSING = "–"
WHAT = {
    "anytime": "Anytime accuracy (top-1, %) at each exit, with its multiply-adds",
    "budgeted": "Budgeted-batch accuracy (top-1, %) at average budgets of multiply-adds per image",
}


@dataclass(frozen=True)
class Cell:
    """One accuracy, as text: `mean`, `sd` (empty for one seed), and whether it is the best of its column."""

    mean: str
    sd: str
    best: bool

    def text(self, plus_minus: str = "±") -> str:
        """Return `97.3 ± 0.4`, or the mean alone."""
        return f"{self.mean} {plus_minus} {self.sd}" if self.sd else self.mean


@dataclass(frozen=True)
class Wide:
    """One table: methods down, exits or budgets across."""

    kind: str
    """"anytime" or "budgeted"."""
    group: str
    """backbone and data set, for people."""
    caption: str
    heads: list[tuple[str, str]]
    """For each column "exit 1" (or "budget") and its multiply-adds in `unit`, "0.12"."""
    unit: str
    """" M", " K", ...: what follows the multiply-adds."""
    cells: dict[str, list[Cell]]
    """For each method, one cell a column."""
    seeds: dict[str, int]
    """For each method, over how many seeds."""


def unit_for(costs: Iterable[float]) -> tuple[str, float]:
    """Return the unit ("K", "M", "G") in which these multiply-adds read best, and its size."""
    least = min(costs)
    return next(((name, size) for name, size in UNITS.items() if least >= size / 10), ("", 1.0))


def write_costs(costs: Sequence[float]) -> list[str]:
    """Write multiply-adds in one unit, without it, with just the decimals that tell them apart."""
    _, size = unit_for(costs)
    scaled = [cost / size for cost in costs]
    decimals = 0 if size == 1 or min(scaled) >= 100 else 1 if min(scaled) >= 10 else 2
    for digits in range(decimals, decimals + 4):
        texts = [f"{value:.{digits}f}" for value in scaled]
        if len(set(texts)) == len(set(scaled)):
            break
    return texts


def wide_tables(comparison: Comparison, kind: str) -> list[Wide]:
    """Return the "anytime" or "budgeted" table of each backbone and data set."""
    frame = comparison.anytime if kind == "anytime" else comparison.budgeted
    decimals = {group: _decimals(rows["accuracy_sd"]) for group, rows in comparison.anytime.groupby(GROUP)}
    return [_wide(kind, rows, decimals[group]) for group, rows in frame.groupby(GROUP, sort=False)]


TRAINING_HEADS = ["training (s)", "time ratio", "peak memory (MiB)", "memory ratio"]


def training_rows(rows: pd.DataFrame) -> list[list[str]]:
    """Return one row a method: its name, what stands under `TRAINING_HEADS`, and the number of seeds."""
    return [
        [
            row["method"],
            Cell(f"{row['seconds_mean']:.1f}", f"{row['seconds_sd']:.1f}" if row["n"] > 1 else "", best=False).text(),
            f"{row['time_relative']:.2f}",
            f"{row['memory_mib']:.0f}",
            f"{row['memory_relative']:.2f}",
            str(row["n"]),
        ]
        for row in rows.to_dict("records")
    ]


SIGNIFICANCE = 0.05


def difference_heads(rows: pd.DataFrame) -> list[str]:
    """Return the columns of the table of differences: the exits, and the area under the budgeted curve."""
    return list(dict.fromkeys(rows["measure"]))


def difference_rows(rows: pd.DataFrame) -> dict[str, list[Cell]]:
    """Return one row a method; best is what stays significant after Holm's correction, with a star."""
    table: dict[str, list[Cell]] = {}
    for row in rows.to_dict("records"):
        sure = row["p_holm"] < SIGNIFICANCE
        reach = "" if row["n"] < 2 else f"{(row['high'] - row['low']) / 2:.2f}"
        text = "–" if pd.isna(row["mean"]) else f"{row['mean']:+.2f}" + ("*" if sure else "")
        table.setdefault(row["method"], []).append(Cell(text, reach if text != "–" else "", sure))
    return table


def difference_caption(rows: pd.DataFrame) -> str:
    """Say what the table of differences shows."""
    return (
        f"Difference to {rows['baseline'].iloc[0]} in points of accuracy, seed by seed, with the half width of its "
        "95 % interval; * significant at 0.05 after Holm's correction for the methods of a column; area: mean height "
        "of the budgeted curve"
    )


def published_rows(rows: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of the table that sets ours and the papers' accuracies side by side."""
    exits = sorted(rows["exit"].unique())
    table = []
    for (method, paper, place), mine in rows.groupby(["method", "paper", "table"], sort=False):
        by_exit = mine.set_index("exit")
        for who, column in (("ours", "accuracy_mean"), (f"{paper}, {place}", "published")):
            values = by_exit[column].reindex(exits)
            epochs = by_exit["epochs" if column == "accuracy_mean" else "published_epochs"].iloc[0]
            table.append([str(method), who, *(MISSING if pd.isna(v) else f"{v:.2f}" for v in values), str(epochs)])
    return ["method", "source", *(f"exit {number}" for number in exits), "epochs"], table


def published_caption(rows: pd.DataFrame) -> str:
    """Say what the table shows, and whether it is a fair comparison."""
    fair = (rows["epochs"] == rows["published_epochs"]).all()
    warning = "" if fair else "; OURS IS NOT THE PAPER'S SCHEDULE, so that the two can't be compared"
    notes = "".join(f"; {note}" for note in dict.fromkeys(rows["note"]) if note)
    return f"Ours beside the published accuracy (top-1, %){warning}{notes}"


def training_caption(rows: pd.DataFrame) -> str:
    """Say what the table is and what it is relative to."""
    methods = list(rows["method"])
    return f"What training cost, all epochs; ratios to {BASELINE if BASELINE in methods else methods[0]}"


def _decimals(sds: pd.Series) -> int:
    """Return 1 where seeds differ by about half a percent or more (further digits would be noise), else 2."""
    return 1 if sds.median() >= 0.5 else 2


def seed_count(seeds: Collection[int]) -> str:
    """Write over how many seeds, for one count a method: "2 seeds", "1 to 3 seeds"."""
    least, most = min(seeds), max(seeds)
    return f"{least if least == most else f'{least} to {most}'} seed{'s' if most > 1 else ''}"


def group_name(rows: pd.DataFrame) -> str:
    """Return "backbone on dataset" of the rows of one group."""
    return f"{rows['backbone'].iloc[0]} on {rows['dataset'].iloc[0]}"


def _wide(kind: str, rows: pd.DataFrame, decimals: int) -> Wide:
    across = "exit" if kind == "anytime" else "budget"
    methods = list(dict.fromkeys(rows["method"]))
    means = rows.pivot(index="method", columns=across, values="accuracy_mean").loc[methods]
    sds = rows.pivot(index="method", columns=across, values="accuracy_sd").loc[methods]
    seeds = {str(method): int(n) for method, n in rows.groupby("method", sort=False)["n"].first().items()}
    heads, unit = _heads(rows, across)
    over = f", mean ± sd over {seed_count(seeds.values())}" if max(seeds.values()) > 1 else ""
    return Wide(
        kind=kind,
        group=group_name(rows),
        caption=f"{WHAT[kind]}: {group_name(rows)}{over}. Best of each column in bold.",
        heads=heads,
        unit=unit,
        cells=_cells(means, sds, decimals),
        seeds=seeds,
    )


def _cells(means: pd.DataFrame, sds: pd.DataFrame, decimals: int) -> dict[str, list[Cell]]:
    """Write each cell; all that read the same as the best of their column are best."""

    def text(value: float, missing: str) -> str:
        return missing if np.isnan(value) else f"{value:.{decimals}f}"

    best = [text(value, MISSING) for value in means.max(axis=0)]
    cells: dict[str, list[Cell]] = {}
    for method, mean, sd in zip(means.index, means.to_numpy(), sds.to_numpy(), strict=True):
        shown = [text(value, MISSING) for value in mean]
        spread = [text(value, "") for value in sd]
        cells[str(method)] = [Cell(m, s, best=m == top) for m, s, top in zip(shown, spread, best, strict=True)]
    return cells


def _heads(rows: pd.DataFrame, across: str) -> tuple[list[tuple[str, str]], str]:
    cost = "macs" if across == "exit" else "budget"
    span = rows.groupby(across)[cost].agg(["min", "max"])
    values = sorted({*span["min"], *span["max"]})
    unit, _ = unit_for(values)
    texts = dict(zip(values, write_costs(values), strict=True))
    heads = []
    for k, low, high in span.itertuples():
        # Methods may widen a network (ISC): then the exit's cost is a range.
        amount = texts[low] if low == high else f"{texts[low]}–{texts[high]}"
        heads.append((f"exit {k}" if across == "exit" else "budget", amount))
    return heads, f" {unit}".rstrip()
