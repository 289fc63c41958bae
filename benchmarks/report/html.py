"""A comparison as one HTML page: its tables and interactive charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pandas as pd

from exitkit.benchmarks.report import page
from exitkit.benchmarks.report.comparison import GROUP, STATIC, Comparison
from exitkit.benchmarks.report.diagnostics import Picture
from exitkit.benchmarks.report.document import caption, lead, title
from exitkit.benchmarks.report.figures import axis_of
from exitkit.benchmarks.report.narrow_tables import Sheet, cost_text, sheets
from exitkit.benchmarks.report.wide_tables import Wide, group_name, wide_tables

_ACCURACY = "accuracy (%)"


def html_report(
    comparison: Comparison, learning: pd.DataFrame, swept: pd.DataFrame, diagnosed: Sequence[Picture] = ()
) -> str:
    """Return the report as one HTML page.

    Args:
        comparison: the comparison.
        learning, swept: the tables of module `learning`; empty tables are not drawn.
        diagnosed: figures of `exitkit diagnose`.
    """
    indices = {name: index for index, name in enumerate(dict.fromkeys(comparison.anytime["method"]))}
    sections = []
    narrow = sheets(comparison)
    wide = {kind: wide_tables(comparison, kind) for kind in ("anytime", "budgeted")}
    for number, (_, rows) in enumerate(comparison.anytime.groupby(GROUP, sort=False)):
        group = group_name(rows)
        blocks: list[Any] = [_wide(tables[number]) for tables in wide.values()]
        blocks.insert(1, _anytime(comparison, rows, indices))
        blocks.append(_budgeted(comparison, _of(comparison.curve, rows), indices))
        blocks += [_sheet(sheet) for sheet in narrow if sheet.group == group]
        curves = _of(learning, rows)
        blocks += [_learning(curves, indices)] if len(curves) else []
        sections.append(page.Section(group, blocks))
    sections += [
        page.Section(f"All {kind} networks on {data}", [_stitched(comparison, rows, indices)])
        for (kind, data), rows in comparison.stitched.groupby(["family", "dataset"], sort=False)
    ]
    if len(swept):
        charts = [_sweep(names, rows) for names, rows in swept.groupby(["method", "field", *GROUP], sort=False)]
        sections.append(page.Section("Sweeps", charts))
    if diagnosed:
        pictures = [
            page.Image(picture.caption, picture.source.with_suffix(".png").read_bytes()) for picture in diagnosed
        ]
        sections.append(page.Section("Diagnostics", pictures))
    return page.html_page(title(comparison), lead(comparison), sections)


def _of(frame: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a table with the same backbone and data set as `rows`."""
    backbone, dataset = rows["backbone"].iloc[0], rows["dataset"].iloc[0]
    matches: pd.DataFrame = frame[(frame["backbone"] == backbone) & (frame["dataset"] == dataset)]
    return matches


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", frame.to_dict("records"))


def _wide(table: Wide) -> page.Table:
    heads = ["method", *(f"{name} ({cost}{table.unit})" for name, cost in table.heads), "n"]
    rows = []
    for name, cells in table.cells.items():
        numbers = [page.Cell(cell.text(), _number(cell.mean), cell.best) for cell in cells]
        rows.append([page.Cell(name), *numbers, page.Cell(table.count(name), float(table.seeds[name]))])
    return page.Table(f"{table.kind.capitalize()} accuracy", heads, rows, table.caption)


def _sheet(sheet: Sheet) -> page.Table:
    rows = [[page.Cell(cell.text(), _number(cell.mean), cell.best) for cell in row] for row in sheet.rows]
    return page.Table(sheet.title, sheet.heads, rows, sheet.caption)


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("*"))
    except ValueError:
        return None


def _anytime(comparison: Comparison, rows: pd.DataFrame, indices: Mapping[str, int]) -> page.Chart:
    column = comparison.cost_column
    label, size = axis_of(comparison, rows[column])
    series = []
    for method, group in rows.groupby("method", sort=False):
        points = []
        for row in _records(group):
            facts = [("method", str(method)), ("exit", str(row["exit"])), *_amounts(comparison, row, row[column])]
            points.append(_point(row[column] / size, row, facts))
        series.append(page.Series(str(method), points, indices[str(method)]))
    text = caption("anytime", _of(comparison.static, rows))
    return page.Chart("Anytime", label, _ACCURACY, [*series, *_static(comparison, rows, size)], text)


def _static(comparison: Comparison, rows: pd.DataFrame, size: float) -> list[page.Series]:
    group = _of(comparison.static, rows)
    points = []
    for row in _records(group):
        facts = [("static network, exit", str(row["exit"])), *_amounts(comparison, row, row["cost_mean"])]
        points.append(_point(row["cost_mean"] / size, row, facts))
    return [page.Series(STATIC, points, 6, joined=False)] if points else []


def _budgeted(comparison: Comparison, rows: pd.DataFrame, indices: Mapping[str, int]) -> page.Chart:
    label, size = axis_of(comparison, rows["cost_mean"])
    detail = _of(comparison.points, rows).set_index(["method", "point"])
    series = []
    for method, group in rows.groupby("method", sort=False):
        points = []
        for row in _records(group):
            values = detail.loc[(method, row["point"])]
            exits = [name.removeprefix("share_") for name in detail.columns if name.startswith("share_")]
            exits = [k for k in exits if not pd.isna(values[f"share_{k}"])]
            shares = ", ".join(f"{100 * values[f'share_{k}']:.1f}" for k in exits)
            limits = ", ".join(f"{values[f'threshold_{k}']:.3f}" for k in exits[:-1])
            facts = [("method", str(method)), ("point", str(row["point"]))]
            facts += _amounts(comparison, row, row["cost_mean"])
            facts += [("thresholds", limits), ("images per exit (%)", shares)]
            points.append(_point(row["cost_mean"] / size, row, facts))
        series.append(page.Series(str(method), points, indices[str(method)]))
    text = caption("budgeted", _of(comparison.static, rows))
    return page.Chart("Budgeted batch", label, _ACCURACY, [*series, *_static(comparison, rows, size)], text)


def _stitched(comparison: Comparison, rows: pd.DataFrame, indices: Mapping[str, int]) -> page.Chart:
    label, size = axis_of(comparison, rows["cost_mean"])
    series = []
    for method, group in rows.groupby("method", sort=False):
        points = [
            _point(r["cost_mean"] / size, r, [("method", str(method)), *_amounts(comparison, r, r["cost_mean"])])
            for r in _records(group)
        ]
        series.append(page.Series(str(method), points, indices[str(method)]))
    return page.Chart("Networks of several sizes", label, _ACCURACY, series, caption("stitched", comparison.static))


def _learning(rows: pd.DataFrame, indices: Mapping[str, int]) -> page.Chart:
    last = rows["exit"].max()
    series = []
    for method, group in rows[rows["exit"] == last].groupby("method", sort=False):
        points = []
        for row in _records(group):
            facts = [("method", str(method)), ("phase", row["phase"]), ("epoch", str(row["epoch"]))]
            facts += [(name.replace("_", " ").removesuffix(" mean"), f"{row[name]:.2f}") for name in _MEASURED]
            points.append(page.Point(row["epoch"], row["validation_accuracy_mean"], None, None, facts))
        series.append(page.Series(str(method), points, indices[str(method)]))
    return page.Chart(
        "Learning", "epoch", "validation accuracy (%)", series, f"Validation accuracy of exit {last} during training."
    )


_MEASURED = ("train_accuracy_mean", "validation_accuracy_mean", "train_loss_mean", "validation_loss_mean")


def _sweep(names: Any, rows: pd.DataFrame) -> page.Chart:
    method, field, backbone, dataset = names
    series = []
    for index, (number, group) in enumerate(rows.groupby("exit")):
        points = []
        for row in _records(group.sort_values("value")):
            facts = [(field, f"{row['value']:g}"), ("exit", str(number)), ("accuracy", f"{row['accuracy_mean']:.2f} %")]
            points.append(_point(row["value"], row, facts))
        series.append(page.Series(f"exit {number}", points, index))
    return page.Chart(f"{method}, {backbone} on {dataset}", field, _ACCURACY, series, caption("sweep", rows[:0]))


def _amounts(comparison: Comparison, row: Mapping[str, Any], cost: float) -> list[tuple[str, str]]:
    spread = "" if pd.isna(row["accuracy_sd"]) else f" ± {row['accuracy_sd']:.2f}"
    accuracy = f"{row['accuracy_mean']:.2f}{spread} %"
    return [("cost", cost_text(comparison, cost)), ("accuracy", accuracy), ("seeds", str(row["n"]))]


def _point(x: float, row: Mapping[str, Any], facts: list[tuple[str, str]]) -> page.Point:
    mean, sd = row["accuracy_mean"], row["accuracy_sd"]
    low, high = (None, None) if pd.isna(sd) else (mean - sd, mean + sd)
    return page.Point(float(x), mean, low, high, facts)
