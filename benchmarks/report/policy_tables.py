"""The comparison of exit policies as a table on the terminal, a figure and an HTML page."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from exitkit.benchmarks.report import page
from exitkit.benchmarks.report.comparisons import records
from exitkit.benchmarks.report.drawing import Axes, Figure, own_style
from exitkit.benchmarks.report.figures import COLOURS, DASHES, HEIGHT, MARKERS, WIDTH
from exitkit.benchmarks.report.statistics import SIGNIFICANCE
from exitkit.benchmarks.report.wide_tables import MISSING, unit_for
from exitkit.cli.terminal import Console
from exitkit.inference.policy import BASELINE, PLAIN, label

NAMES = ["combination", "score", "rule"]
CAPTION = (
    "Operating points are selected on validation, cross-fitted in 5 folds, within the budget there; the cost on test "
    "images is in policies.csv. Test accuracy (%), and "
    "the difference to plain confidence with the half width of its 95 % interval over images; * significant at 0.05 "
    "after Holm's correction. falls: steps between exits at which the true class's probability falls (%); ECE: "
    "expected calibration error, mean over the exits (%); s: seconds to fit."
)


def print_table(frame: pd.DataFrame, console: Console, most: int | None, cost: str) -> None:
    """Print the policies by mean accuracy over the budgets; at most `most` rows besides the baseline."""
    unit, size = _unit(frame["budget"], cost)
    table = Table(box=box.SIMPLE_HEAVY, padding=(0, 1, 0, 0), header_style="bold cyan")
    table.add_column("policy")
    for budget in frame["budget"].unique():
        table.add_column(f"{budget / size:.3g}{unit}", justify="right", no_wrap=True)
    for name in ("falls", "ECE", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    ranked = _ranked(frame)
    best = frame.groupby("budget")["accuracy"].max()
    for number, (names, rows) in enumerate(ranked):
        if most is not None and number >= most and names != _BASELINE:
            continue
        cells = []
        for row in records(rows):
            cell = Text(_number(row["accuracy"]), style="bold green" if row["accuracy"] == best[row["budget"]] else "")
            if names != _BASELINE and not pd.isna(row["difference"]):
                cell.append(f"\n{_difference(row)}", style="not bold dim default")
            cells.append(cell)
        last = rows.iloc[0]
        facts = [f"{last['falls']:.1f}", f"{last['calibration']:.1f}", f"{last['seconds']:.2f}"]
        table.add_row(Text(label(*names)), *cells, *facts)
    console.print(table)
    if most is not None and len(ranked) > most:
        console.print(
            Text(f" the best {most} of {len(ranked)} policies and the baseline; --all prints them all", "dim")
        )
    console.print(Text(f" {preferences(frame, cost)}"))
    console.print(Text(f" {CAPTION}", style="dim"))


_BASELINE = (BASELINE.combination, BASELINE.score, BASELINE.rule)


def _unit(budgets: pd.Series, cost: str) -> tuple[str, float]:
    """Return the unit of the budgets in a table, and its size."""
    return (" ms", 1.0) if cost == "latency" else unit_for(budgets)


def preferences(frame: pd.DataFrame, cost: str) -> str:
    """Return the preferred policy of each budget, as text."""
    unit, size = _unit(frame["budget"], cost)
    chosen = records(frame[frame["preferred"]].sort_values("budget"))
    names = [f"{label(*(row[name] for name in NAMES))} at {row['budget'] / size:.3g}{unit}" for row in chosen]
    return f"Preferred on validation: {', '.join(names)}."


def _ranked(frame: pd.DataFrame) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    groups = [(tuple(map(str, _tuple(names))), rows) for names, rows in frame.groupby(NAMES, sort=False)]
    means = {names: rows["accuracy"].mean(skipna=False) for names, rows in groups}
    # Policies without an operating point at a budget come last: their other budgets alone would rank too high.
    return sorted(groups, key=lambda group: (np.isnan(means[group[0]]), -means[group[0]]))


def _tuple(names: Hashable) -> tuple[Any, ...]:
    return names if isinstance(names, tuple) else (names,)


def _accuracy(row: dict[str, Any], best: pd.Series) -> page.Cell:
    return page.Cell(_number(row["accuracy"]), row["accuracy"], row["accuracy"] == best[row["budget"]])


def _number(value: float) -> str:
    return MISSING if pd.isna(value) else f"{value:.2f}"


def _difference(row: dict[str, Any]) -> str:
    if pd.isna(row["difference"]):
        return MISSING
    star = "*" if row["p_holm"] < SIGNIFICANCE else ""
    width = "" if pd.isna(row["high"]) else f" ±{row['high'] - row['difference']:.2f}"
    return f"{row['difference']:+.2f}{width}{star}".replace("-", "\N{MINUS SIGN}")


def curves_figure(curves: pd.DataFrame, cost: str = "macs") -> Figure:
    """Plot test accuracy against cost: on the left the rules on plain outputs, on the right the combinations."""
    plain = curves[(curves["combination"] == PLAIN) & curves["score"].isin(["confidence", ""])]
    shares = curves[(curves["score"] == BASELINE.score) & (curves["rule"] == BASELINE.rule)]
    panels = {
        "rule": ("exit rules, without a combination", plain),
        "combination": ("combinations, by confidence and shares", shares),
    }
    with own_style():
        figure = Figure(figsize=(2 * WIDTH, HEIGHT + 0.5), layout="constrained")
        axis, size = _axis(curves, cost)
        for axes, (column, (title, rows)) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            for index, (name, group) in enumerate(rows.groupby(column, sort=False)):
                _line(axes, group.sort_values("cost"), size, str(name), index)
            axes.set_title(title)
            axes.set_xlabel(axis)
            axes.grid(True)
            axes.legend(frameon=False, loc="lower right")
        figure.axes[0].set_ylabel("accuracy (%)")
    return figure


def _axis(curves: pd.DataFrame, cost: str) -> tuple[str, float]:
    """Return the label of the cost axis and the size of its unit."""
    if cost == "latency":
        return "milliseconds per image", 1.0
    unit, size = unit_for(curves["cost"])
    return f"multiply-adds ({unit})" if unit else "multiply-adds", size


def _line(axes: Axes, rows: pd.DataFrame, size: float, label: str, index: int) -> None:
    axes.plot(
        rows["cost"] / size,
        rows["accuracy"],
        label=label,
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        ls=DASHES[index % len(DASHES)],
        markevery=max(1, len(rows) // 8),
    )


def html(groups: Sequence[tuple[str, pd.DataFrame, pd.DataFrame]], lead: Sequence[str], cost: str = "macs") -> str:
    """Return the comparison as one HTML page.

    Args:
        groups: (title, table of `policies.comparison`, table of `policies.curves`) of each group of runs.
        lead: paragraphs of the introduction.
        cost: macs or latency.
    """
    sections = [page.Section(title, [*_tables(frame, cost), *_charts(curves, cost)]) for title, frame, curves in groups]
    return page.html_page("Comparison of exit policies", list(lead), sections)


def _charts(curves: pd.DataFrame, cost: str) -> list[page.Chart]:
    axis, size = _axis(curves, cost)
    plain = curves["combination"] == PLAIN
    baseline = plain & (curves["score"] == BASELINE.score) & (curves["rule"] == BASELINE.rule)
    charts = {"Scores and rules, without a combination": curves[plain], "Combinations": curves[~plain | baseline]}
    return [
        page.Chart(
            title, axis, "accuracy (%)", [_series(names, group, size, k) for k, (names, group) in _numbered(rows)]
        )
        for title, rows in charts.items()
        if len(rows)
    ]


def _numbered(rows: pd.DataFrame) -> Iterable[tuple[int, tuple[tuple[str, ...], pd.DataFrame]]]:
    return enumerate((tuple(map(str, _tuple(names))), group) for names, group in rows.groupby(NAMES, sort=False))


def _series(names: tuple[str, ...], rows: pd.DataFrame, size: float, index: int) -> page.Series:
    points = []
    for row in records(rows.sort_values("cost")):
        facts = [
            ("policy", label(*names)),
            ("point", str(row["point"])),
            ("cost", f"{row['cost'] / size:.3g}"),
            ("accuracy", f"{row['accuracy']:.2f} %"),
            ("on validation", f"{row['validation_accuracy']:.2f} %"),
        ]
        points.append(page.Point(row["cost"] / size, row["accuracy"], None, None, facts))
    return page.Series(label(*names), points, index)


def _tables(frame: pd.DataFrame, cost: str) -> list[page.Table]:
    """Return accuracies and differences as two tables: one would be too wide for a page."""
    unit, size = _unit(frame["budget"], cost)
    heads = ["policy", *(f"{budget / size:.3g}{unit}" for budget in frame["budget"].unique())]
    best = frame.groupby("budget")["accuracy"].max()
    accuracies, differences = [], []
    for names, group in _ranked(frame):
        name, last = page.Cell(label(*names)), group.iloc[0]
        facts = [page.Cell(f"{last[key]:.1f}", float(last[key])) for key in ("falls", "calibration")]
        facts.append(page.Cell(f"{last['seconds']:.2f}", float(last["seconds"])))
        accuracies.append([name, *(_accuracy(row, best) for row in records(group)), *facts])
        if names != _BASELINE:
            differences.append([name, *(page.Cell(_difference(row), row["difference"]) for row in records(group))])
    caption = f"{preferences(frame, cost)} {CAPTION}"
    tables = [page.Table("Accuracy within budgets (%)", [*heads, "falls", "ECE", "s"], accuracies, caption)]
    if differences:
        about = "Percentage points of test accuracy, with the half width of the 95 % interval; * as above."
        tables.append(page.Table("Differences to plain confidence", heads, differences, about))
    return tables
