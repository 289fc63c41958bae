"""A comparison as one HTML page: its tables and interactive charts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from exitkit.benchmarks.report import page
from exitkit.benchmarks.report.comparison import GROUP, STATIC, Comparison
from exitkit.benchmarks.report.comparisons import records
from exitkit.benchmarks.report.diagnostics import Picture
from exitkit.benchmarks.report.document import caption, lead, title
from exitkit.benchmarks.report.figures import axis_of, best_first, oracle_range, whole_curve
from exitkit.benchmarks.report.narrow_tables import TITLES, Sheet, cost_text, number, sheets
from exitkit.benchmarks.report.statistics import SIGNIFICANCE
from exitkit.benchmarks.report.wide_tables import MISSING, Wide, group_name, wide_tables
from exitkit.cli.catalogue import entries

_ACCURACY = "accuracy (%)"


def html_report(
    comparison: Comparison,
    learning: pd.DataFrame,
    swept: pd.DataFrame,
    diagnosed: Sequence[Picture] = (),
    made_by: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the report as one HTML page.

    Args:
        comparison: the comparison.
        learning, swept: the tables of module `learning`; empty tables are not drawn.
        diagnosed: figures of `exitkit diagnose`.
        made_by: the facts of `provenance`.
    """
    groups = {entry["name"]: entry["group"] for entry in entries("methods")}
    indices = {name: index for index, name in enumerate(dict.fromkeys(comparison.anytime["method"]))}
    sections = []
    narrow = sheets(comparison)
    wide = {kind: wide_tables(comparison, kind) for kind in ("anytime", "budgeted")}
    for index, (_, rows) in enumerate(comparison.anytime.groupby(GROUP, sort=False)):
        group = group_name(rows)
        blocks: list[Any] = [_wide(tables[index]) for tables in wide.values()]
        blocks.insert(1, _anytime(comparison, rows, indices))
        if len(rows["method"].unique()) > 1:
            blocks.insert(0, _overview(comparison, rows, groups))
        curve = _of(whole_curve(comparison), rows)
        blocks += [_budgeted(comparison, curve, indices), _oracle(comparison, curve, indices)]
        blocks += _differences(_of(comparison.differences, rows))
        blocks += [_sheet(sheet) for sheet in narrow if sheet.group == group]
        blocks += _policy_differences(_of(comparison.policy_differences, rows))
        blocks += _policies(comparison, _of(comparison.policy_curve, rows))
        curves = _of(learning, rows)
        blocks += _learning(curves, indices)
        sections.append(page.Section(group, blocks))
    sections += [
        page.Section(f"All {kind} networks on {data}", [_stitched(comparison, rows, indices)])
        for (kind, data), rows in comparison.stitched.groupby(["family", "dataset"], sort=False)
    ]
    if len(swept):
        charts = [_sweep(names, rows) for names, rows in swept.groupby(["method", "field", *GROUP], sort=False)]
        sections.append(page.Section("Sweeps", charts))
    shown = {section.title for section in sections}
    absent = [sheet for sheet in narrow if sheet.group not in shown]  # networks and data of which no run is finished
    sections += [page.Section(sheet.group, [_sheet(sheet)]) for sheet in absent]
    if diagnosed:
        pictures = [
            page.Image(picture.caption, picture.source.with_suffix(".png").read_bytes()) for picture in diagnosed
        ]
        sections.append(page.Section("Diagnostics", pictures))
    if made_by:
        facts = page.Facts([[page.Cell(name), page.Cell(text)] for name, text in made_by])
        sections.append(page.Section("How this report was made", [facts]))
    return page.html_page(title(comparison), lead(comparison), sections)


def _of(frame: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a table with the same backbone and data set as `rows`."""
    backbone, dataset = rows["backbone"].iloc[0], rows["dataset"].iloc[0]
    matches: pd.DataFrame = frame[(frame["backbone"] == backbone) & (frame["dataset"] == dataset)]
    return matches


def _wide(table: Wide) -> page.Table:
    heads = ["method", *(f"{name} ({cost}{table.unit})" for name, cost in table.heads), "n"]
    rows = []
    for name, cells in table.cells.items():
        numbers = [page.Cell(cell.text(), _number(cell.mean), cell.best) for cell in cells]
        rows.append([page.Cell(name), *numbers, page.Cell(table.count(name), float(table.seeds[name]))])
    return page.Table(TITLES[table.kind], heads, rows, table.caption)


def _overview(comparison: Comparison, rows: pd.DataFrame, groups: Mapping[str, str]) -> page.Table:
    """Return a table of one row per method: what it changes, its cost, its area, and accuracy at three budgets.

    Args:
        comparison: the comparison.
        rows: the rows of `comparison.anytime` of one network and data set.
        groups: {method: group of the methods that change the same part of training}.
    """
    budgeted = _of(comparison.budgeted, rows)
    budgets = sorted(budgeted["budget"].unique())
    chosen = list(dict.fromkeys([budgets[0], budgets[len(budgets) // 2], budgets[-1]]))
    accuracy = {(row["method"], row["budget"]): row["accuracy_mean"] for row in records(budgeted)}
    changes = [row for row in records(_of(comparison.differences, rows)) if row["measure"] == "area"]
    areas = {row["method"]: row for row in changes}
    table = []
    for method, exits in rows.groupby("method", sort=False):
        parts = dict.fromkeys(groups.get(name, MISSING) for name in str(method).split(" ")[0].split("+"))
        cost = float(exits[comparison.cost_column].iloc[-1])
        cells = [page.Cell(str(method)), page.Cell(", ".join(parts)), page.Cell(cost_text(comparison, cost), cost)]
        for name, digits, sign in (("mean", 2, "+"), ("low", 2, "+"), ("high", 2, "+"), ("p_holm", 3, "")):
            cells.append(_cell(areas.get(method, {}).get(name, math.nan), digits, sign))
        values = [accuracy.get((method, budget), math.nan) for budget in chosen]
        table.append([*cells, *(_cell(value, 2) for value in [*values, float(exits["accuracy_mean"].iloc[-1])])])
    at = [f"at {cost_text(comparison, budget)}" for budget in chosen]
    heads = ["method", "changes", "cost", "area", "from", "to", "p", *at]
    baseline = changes[0]["baseline"] if changes else "the baseline"
    caption = (
        f"Click a column to sort by it. Cost: all exits, per image. Area: difference to {baseline} of the mean height "
        "of the budgeted curve, with its 95 % interval and p after Holm's correction for the methods. Then accuracy "
        "(%) at three average budgets, and of the last exit"
    )
    return page.Table("Overview", [*heads, "last exit"], table, caption)


def _cell(value: float, digits: int, sign: str = "") -> page.Cell:
    return page.Cell(number(value, digits, sign), None if math.isnan(value) else value)


def _sheet(sheet: Sheet) -> page.Table:
    rows = [[page.Cell(cell.text(), _number(cell.mean), cell.best) for cell in row] for row in sheet.rows]
    return page.Table(sheet.title, sheet.heads, rows, sheet.caption)


_NUMBER = re.compile(r"([+-]?[\d,]*\.?\d+)\*?(?: ?([KMGT]))?(?: ms)?")
_SIZES = {None: 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def _number(text: str) -> float | None:
    """Return the number of a cell such as "1,000", "+0.42*" or "12.3 M"; None if it is none."""
    found = _NUMBER.fullmatch(text)
    return float(found[1].replace(",", "")) * _SIZES[found[2]] if found else None


def _anytime(comparison: Comparison, rows: pd.DataFrame, indices: Mapping[str, int]) -> page.Chart:
    column = comparison.cost_column
    label, size = axis_of(comparison, rows[column])
    series = []
    for method, group in rows.groupby("method", sort=False):
        points = []
        for row in records(group):
            facts = [("method", str(method)), ("exit", str(row["exit"])), *_amounts(comparison, row, row[column])]
            points.append(_point(row[column] / size, row, facts))
        series.append(page.Series(str(method), points, indices[str(method)]))
    text = caption("anytime", _of(comparison.static, rows))
    return page.Chart("Anytime", label, _ACCURACY, [*series, *_static(comparison, rows, size)], text)


def _static(comparison: Comparison, rows: pd.DataFrame, size: float) -> list[page.Series]:
    group = _of(comparison.static, rows)
    points = []
    for row in records(group):
        facts = [("static network, exit", str(row["exit"])), *_amounts(comparison, row, row["cost_mean"])]
        points.append(_point(row["cost_mean"] / size, row, facts))
    return [page.Series(STATIC, points, 6, joined=False)] if points else []


def _curves(
    comparison: Comparison, rows: pd.DataFrame, size: float, indices: Mapping[str, int], by: str = "method"
) -> list[page.Series]:
    """Return the curve of each method or policy over the mean cost, in units of `size`."""
    series = []
    for name, group in rows.groupby(by, sort=False):
        points = [
            _point(r["cost_mean"] / size, r, [(by, str(name)), *_amounts(comparison, r, r["cost_mean"])])
            for r in records(group.sort_values("cost_mean", kind="stable"))
        ]
        series.append(page.Series(str(name), points, indices[str(name)]))
    return series


def _oracle(comparison: Comparison, rows: pd.DataFrame, indices: Mapping[str, int]) -> page.Chart:
    label, size = axis_of(comparison, rows["cost_mean"])
    series = _curves(comparison, rows, size, indices)
    limits = _of(comparison.oracle, rows)
    for method, group in limits.groupby("method", sort=False):
        points = []
        for row in records(oracle_range(comparison, group)):
            facts = [("method", f"{method}, upper bound"), *_amounts(comparison, row, row["cost_mean"])]
            points.append(page.Point(row["cost_mean"] / size, row["accuracy_mean"], None, None, facts))
        series.append(page.Series(f"{method}, upper bound", points, indices[str(method)], dotted=True))
    return page.Chart("Upper bounds", label, _ACCURACY, series, caption("oracle", comparison.static))


def _budgeted(comparison: Comparison, rows: pd.DataFrame, indices: Mapping[str, int]) -> page.Chart:
    label, size = axis_of(comparison, rows["cost_mean"])
    detail = _of(comparison.points, rows).set_index(["method", "point"])
    series = []
    for method, group in rows.groupby("method", sort=False):
        points = []
        for row in records(group.sort_values("cost_mean", kind="stable")):
            if pd.isna(row["point"]):
                facts = [("method", str(method)), ("budget", cost_text(comparison, row["budget"]))]
                facts += _amounts(comparison, row, row["cost_mean"])
                points.append(_point(row["cost_mean"] / size, row, facts))
                continue
            values = detail.loc[(method, row["point"])]
            exits = [name.removeprefix("share_") for name in detail.columns if name.startswith("share_")]
            exits = [k for k in exits if not pd.isna(values[f"share_{k}"])]
            shares = ", ".join(f"{100 * values[f'share_{k}']:.1f}" for k in exits)
            limits = ", ".join(f"{values[f'threshold_{k}']:.3f}" for k in exits[:-1])
            facts = [("method", str(method)), ("point", str(int(row["point"])))]
            facts += _amounts(comparison, row, row["cost_mean"])
            facts += [("thresholds", limits), ("images per exit (%)", shares)]
            points.append(_point(row["cost_mean"] / size, row, facts))
        series.append(page.Series(str(method), points, indices[str(method)]))
    text = caption("budgeted", _of(comparison.static, rows))
    return page.Chart("Budgeted batch", label, _ACCURACY, [*series, *_static(comparison, rows, size)], text)


def _differences(rows: pd.DataFrame) -> list[page.Row]:
    """Return a chart each for the first exit, the last exit and the area; no row without differences."""
    if rows.empty:
        return []
    exits = [measure for measure in dict.fromkeys(rows["measure"]) if measure != "area"]
    label = f"difference to {rows['baseline'].iloc[0]} (percentage points)"
    charts = []
    for measure in dict.fromkeys((exits[0], exits[-1], "area")):
        some = rows[rows["measure"] == measure]
        if len(some):
            charts.append(page.Intervals(f"Differences, {measure}", label, _intervals(some, "method"), _INTERVALS))
    return [page.Row(charts)]


def _policy_differences(rows: pd.DataFrame) -> list[page.Row]:
    """Return a chart per method, with the same axis and order of policies; no row without policies."""
    if rows.empty:
        return []
    label = "difference to confidence (percentage points)"
    ends = rows[["mean", "low", "high"]].to_numpy().ravel().tolist()
    order = best_first(rows)
    charts = []
    for method, some in rows.groupby("method", sort=False):
        found = _intervals(some.sort_values("policy", key=lambda names: names.map(order.index)), "policy")
        charts.append(page.Intervals(f"Exit policies, {method}", label, found, _INTERVALS, ends))
    return [page.Row(charts)]


def _intervals(rows: pd.DataFrame, column: str) -> list[page.Interval]:
    found = []
    for row in records(rows):
        interval = f"{number(row['low'], 2, '+')} to {number(row['high'], 2, '+')}"
        facts = [(column, str(row[column])), ("difference", number(row["mean"], 2, "+")), ("95 % interval", interval)]
        if "budgets" in row:
            facts.append(("budgets", str(row["budgets"])))
        facts += [("p (Holm)", number(row["p_holm"], 3)), ("seeds", str(row["n"]))]
        significant = bool(row["p_holm"] < SIGNIFICANCE)
        found.append(page.Interval(str(row[column]), row["mean"], row["low"], row["high"], significant, facts))
    return found


_INTERVALS = "With 95 % intervals (none for one seed); filled: significant after Holm's correction"


def _policies(comparison: Comparison, rows: pd.DataFrame) -> list[page.Chart]:
    charts = []
    for method, curves in rows.groupby("method", sort=False):
        label, size = axis_of(comparison, curves["cost_mean"])
        indices = {str(policy): index for index, policy in enumerate(dict.fromkeys(curves["policy"]))}
        series = _curves(comparison, curves, size, indices, "policy")
        text = caption("policies", comparison.static)
        charts.append(page.Chart(f"Exit policies, {method}", label, _ACCURACY, series, text))
    return charts


def _stitched(comparison: Comparison, rows: pd.DataFrame, indices: Mapping[str, int]) -> page.Chart:
    label, size = axis_of(comparison, rows["cost_mean"])
    series = _curves(comparison, rows, size, indices)
    return page.Chart("Networks of several sizes", label, _ACCURACY, series, caption("stitched", comparison.static))


def _learning(rows: pd.DataFrame, indices: Mapping[str, int]) -> list[page.Row]:
    """Return one chart per exit, with the same accuracy axis; no row without learning curves."""
    charts = []
    for exit, at_exit in rows.groupby("exit"):
        series = []
        for method, group in at_exit.groupby("method", sort=False):
            points = []
            for row in records(group):
                facts = [("method", str(method)), ("phase", row["phase"]), ("epoch", str(row["epoch"]))]
                facts += [(name.replace("_", " ").removesuffix(" mean"), f"{row[name]:.2f}") for name in _MEASURED]
                points.append(page.Point(row["epoch"], row["validation_accuracy_mean"], None, None, facts))
            series.append(page.Series(str(method), points, indices[str(method)]))
        charts.append(
            page.Chart(
                f"Learning, exit {exit}",
                "epoch",
                "validation accuracy (%)",
                series,
                y_values=list(rows["validation_accuracy_mean"]),
            )
        )
    return [page.Row(charts)] if charts else []


_MEASURED = ("train_accuracy_mean", "validation_accuracy_mean", "train_loss_mean", "validation_loss_mean")


def _sweep(names: Any, rows: pd.DataFrame) -> page.Chart:
    method, field, backbone, dataset = names
    series = []
    for index, (exit, group) in enumerate(rows.groupby("exit")):
        points = []
        for row in records(group.sort_values("value")):
            facts = [(field, f"{row['value']:g}"), ("exit", str(exit)), ("accuracy", f"{row['accuracy_mean']:.2f} %")]
            points.append(_point(row["value"], row, facts))
        series.append(page.Series(f"exit {exit}", points, index))
    return page.Chart(f"{method}, {backbone} on {dataset}", field, _ACCURACY, series, caption("sweep", rows[:0]))


def _amounts(comparison: Comparison, row: Mapping[str, Any], cost: float) -> list[tuple[str, str]]:
    spread = "" if pd.isna(row["accuracy_sd"]) else f" ± {row['accuracy_sd']:.2f}"
    accuracy = f"{row['accuracy_mean']:.2f}{spread} %"
    return [("cost", cost_text(comparison, cost)), ("accuracy", accuracy), ("seeds", str(row["n"]))]


def _point(x: float, row: Mapping[str, Any], facts: list[tuple[str, str]]) -> page.Point:
    mean, sd = row["accuracy_mean"], row["accuracy_sd"]
    low, high = (None, None) if pd.isna(sd) else (mean - sd, mean + sd)
    return page.Point(float(x), mean, low, high, facts)
