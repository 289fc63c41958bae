"""A report as one self-contained HTML page, with sortable tables and interactive charts.

The charts are SVG, with the colours, markers and dashes of the PDF figures. They are visible without JavaScript, which
only adds tooltips, keyboard control and sorting (`page.html`). The output is deterministic.
"""

from __future__ import annotations

import base64
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from exitkit.benchmarks.report.drawing import MarkerStyle, MaxNLocator, Outline, own_style
from exitkit.benchmarks.report.figures import COLOURS, DASHES, MARKERS
from exitkit.benchmarks.report.statistics import without_outliers
from exitkit.benchmarks.report.wide_tables import MISSING
from exitkit.escaping import printable

WIDTH, HEIGHT, TOP, RIGHT, BOTTOM = 720, 400, 38, 20, 56  # a chart and its margins in SVG units; the page scales it
ROW, SPACING = 30, 24  # height of a row in a chart of intervals, and of a further line of its name
LETTERS, LABEL = 20, 50  # the most characters in a line of a row's name and of an axis label there
MANY = 8  # charts of more series show the bands of the selected one only
EDGE = 9  # distance from the end of the axis of the triangle of a value beyond it
LINE, MARKER = 1.8, 8.5  # width of a line, which scales its dashes (as in matplotlib); size of a marker
DOTS: Any = (0, (1, 1.65))  # matplotlib's ":"
CROWDED = 12  # lines of more points show only some markers, as in the figures; every point has a tooltip
Scale = Callable[[float], str]


@dataclass(frozen=True)
class Point:
    """A point of a series; `low` and `high` are the ends of an error band, `facts` the content of the tooltip."""

    x: float
    y: float
    low: float | None
    high: float | None
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Series:
    """A line (`joined`) or a set of markers; `index`, that of the method, determines colour, dash and marker."""

    name: str
    points: list[Point]
    index: int
    joined: bool = True
    dotted: bool = False  # a thin dotted line without markers: a bound


@dataclass(frozen=True)
class Chart:
    """A chart of several series."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    caption: str = ""
    y_values: Sequence[float] = ()  # further values that the vertical axis covers, so that several charts share it


@dataclass(frozen=True)
class Interval:
    """A named value with its interval, whose ends are NaN if it has none; `filled` values are significant."""

    name: str
    value: float
    low: float
    high: float
    filled: bool
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Intervals:
    """A chart of intervals below each other."""

    title: str
    x_label: str
    rows: list[Interval]
    caption: str = ""
    x_values: Sequence[float] = ()  # further values that the axis covers, so that several charts share it


@dataclass(frozen=True)
class Cell:
    """A cell of a table: `sort` is its sort key (None: the text); `best` cells are bold."""

    text: str
    sort: float | str | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first column contains the row headers."""

    title: str
    heads: list[str]
    rows: list[list[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Row:
    """Charts beside each other, as many as the page is wide."""

    charts: Sequence[Chart | Intervals]


@dataclass(frozen=True)
class Facts:
    """A list of facts: pairs of a name and a text."""

    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Image:
    """A figure as the bytes of a PNG file, with its caption."""

    title: str
    content: bytes

    @property
    def source(self) -> str:
        """The figure as a data URL, so that the page is self-contained."""
        return f"data:image/png;base64,{base64.b64encode(self.content).decode()}"


Block = Chart | Intervals | Row | Table | Facts | Image


@dataclass(frozen=True)
class Section:
    """A section of the page, with an entry in the contents."""

    title: str
    blocks: Sequence[Block]


def html_page(title: str, lead: list[str], sections: list[Section]) -> str:
    """Return the page as HTML: title, introductory paragraphs, contents and sections."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_finalized
    )
    environment.filters["typeset"] = _typeset
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    numbers: Counter[str] = Counter()

    def view(block: Block) -> dict[str, Any]:
        kind = type(block).__name__
        if isinstance(block, Row):
            return {"kind": kind, "charts": [view(chart) for chart in block.charts]}
        counted = "Chart" if isinstance(block, Image | Intervals) else kind  # all are figures
        numbers[counted] += 1
        more: dict[str, Any] = {}
        if isinstance(block, Chart):
            more = _chart(block)
        elif isinstance(block, Intervals):
            more = _intervals(block)
        elif isinstance(block, Table):
            more = _table(block)
        elif isinstance(block, Image):
            more = {"source": block.source}
        return {**vars(block), **more, "kind": kind, "number": numbers[counted]}

    with own_style():  # the ticks of an axis depend on it
        views = [{"title": section.title, "blocks": [view(block) for block in section.blocks]} for section in sections]
    return template.render(title=title, lead=lead, sections=views, width=WIDTH, height=HEIGHT, line=LINE) + "\n"


def _finalized(value: Any) -> Any:
    """Remove what HTML does not allow in text."""
    return printable(value) if isinstance(value, str) else value


def _typeset(text: str) -> Markup:
    """Set the p of "p < 0.05" in italics, as mathematics is set."""
    return Markup(re.sub(r"\bp (?=&lt; \d)", "<i>p</i> ", str(escape(text))))


def _chart(chart: Chart) -> dict[str, Any]:
    """Return the template values of a chart besides its fields: positions as text, in SVG units.

    Series far below the others are cut off at the bottom, and the caption names them.
    """
    finite = [[point for point in series.points if math.isfinite(point.x + point.y)] for series in chart.series]
    points = [point for some in finite for point in some]
    lowest = {series.name: min(p.y for p in some) for series, some in zip(chart.series, finite, strict=True) if some}
    bottom, _ = without_outliers(list(lowest.values()), max((point.y for point in points), default=math.nan))
    below = {name: value for name, value in lowest.items() if value < bottom and not chart.y_values}
    values = [value for point in points for value in (point.y, *_band(point))] + [*chart.y_values]
    x_low, x_high, x_ticks = _axis([point.x for point in points])
    y_low, y_high, y_ticks = _axis([max(value, bottom) for value in values] if below else values)
    if "%" in chart.y_label and all(point.y <= 100 for point in points):
        y_high = min(y_high, 100.0)  # no accuracy is above 100 %, though an error band may be
    left, right, base = 14 + 11 * max(len(text) for _, text in y_ticks), WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(value: float) -> str:
        return f"{left + (value - x_low) / (x_high - x_low) * (right - left):.2f}"

    def y(value: float) -> str:
        return f"{base - (min(value, y_high) - y_low) / (y_high - y_low) * (base - TOP):.2f}"

    names = ", ".join(f"{name} (down to {value:.1f})" for name, value in below.items())
    caption = [chart.caption, f"Cut off at the bottom: {names}." if below else ""]
    if len(chart.series) > MANY and any(_band(point) for point in points):
        caption.append("Select a series above the chart to see its band.")
    return {
        "caption": " ".join(filter(None, caption)),
        "many": len(chart.series) > MANY,
        "cut": bool(below),
        "frame": (left, TOP, right, base),
        "x_ticks": [(x(value), text) for value, text in x_ticks],
        "y_ticks": [(y(value), text) for value, text in y_ticks if value <= y_high],
        "series": [_series(series, some, x, y, y_low) for series, some in zip(chart.series, finite, strict=True)],
    }


def _series(series: Series, points: list[Point], x: Scale, y: Scale, low: float) -> dict[str, Any]:
    """Return the template values of a series; points below `low` have a tooltip at the bottom, and no marker."""
    colour, dash = COLOURS[series.index % len(COLOURS)], DOTS if series.dotted else DASHES[series.index % len(DASHES)]
    bands, bars = [], []
    # A band is interrupted at points without one; a band of a single point is drawn as a bar.
    for has_band, some in groupby(points, key=lambda point: bool(_band(point))):
        ends = [(x(point.x), *map(y, _band(point))) for point in some if has_band]
        if series.joined and len(ends) > 1:
            edge = [f"{at} {high}" for at, _, high in ends] + [f"{at} {low}" for at, low, _ in reversed(ends)]
            bands.append(f"M{'L'.join(edge)}Z")
        else:
            bars += [f"M{at} {low}V{high}" for at, low, high in ends]
    every = 6 if series.joined and len(points) > CROWDED else 1
    return {
        **vars(series),
        "colour": "currentColor" if colour == "#000000" else colour,  # black would be invisible on a dark page
        "dash": "none" if dash == "-" else " ".join(f"{LINE * length:g}" for length in dash[1]),
        "marker": _marker(MARKERS[series.index % len(MARKERS)]),
        "line": "M" + "L".join(f"{x(p.x)} {y(p.y)}" for p in points) if series.joined and points else "",
        "band": "".join(bands),
        "bars": "".join(bars),
        "marks": [
            (x(p.x), y(max(p.y, low)), p.facts, series.dotted or p.y < low or n % every != 2 * series.index % every)
            for n, p in enumerate(points)
        ],
    }


def _intervals(chart: Intervals) -> dict[str, Any]:
    """Return the template values of a chart of intervals besides its fields, in SVG units.

    Values far outside the others are triangles at the edge, with the value beside them.
    """
    ends = [value for row in chart.rows for value in (row.value, row.low, row.high)] + [*chart.x_values]
    if not chart.x_values:
        whole = [(row.value, row.low, row.high) for row in chart.rows]
        least, most = without_outliers([np.nanmin(values) for values in whole], [np.nanmax(values) for values in whole])
        least, most = min(least, 0.0), max(most, 0.0)
        if least < most and any(not least <= row.value <= most for row in chart.rows):
            ends = np.clip(ends, least, most).tolist()
    low, high, ticks = _axis([value for value in [0.0, *ends] if math.isfinite(value)], most=5)
    names = [textwrap.wrap(row.name, LETTERS) or [""] for row in chart.rows]
    left, right = 14 + 13 * max((len(line) for name in names for line in name), default=0), WIDTH - RIGHT

    def x(value: float) -> str:
        return f"{left + (min(max(value, low), high) - low) / (high - low) * (right - left):.2f}"

    top, rows = ROW / 2, []
    for row, lines in zip(chart.rows, names, strict=True):
        height = ROW + SPACING * (len(lines) - 1)
        middle = top + height / 2
        bar = f"M{x(row.low)} {middle:g}H{x(row.high)}" if math.isfinite(row.low + row.high) else ""
        text = [(f"{top + ROW / 2 + SPACING * n:g}", line) for n, line in enumerate(lines)]
        marker = _marker("<" if row.value < low else ">" if row.value > high else MARKERS[0])
        value = f"{row.value:.1f}".replace("-", "−")
        edge = (1, value) if row.value < low else (-1, value) if row.value > high else ()
        at = f"{(left if row.value < low else right) + EDGE * edge[0]:.2f}" if edge else x(row.value)
        shape = {"marker": marker, "edge": edge, "x": at, "y": f"{middle:g}"}
        rows.append({"text": text, "bar": bar, **shape, **vars(row)})
        top += height
    bottom, label = top + ROW / 2, textwrap.wrap(chart.x_label, LABEL)
    return {
        "frame": (left, bottom, right),
        "ticks": [(x(value), text) for value, text in ticks],
        "zero": x(0.0),
        "rows": rows,
        "colour": COLOURS[0],
        "label": [(f"{bottom + 50 + SPACING * n:g}", line) for n, line in enumerate(label)],
        "height": f"{bottom + BOTTOM + SPACING * (len(label) - 1):g}",
    }


def _table(table: Table) -> dict[str, Any]:
    rows = [[(cell, *_sort_key(cell)) for cell in row] for row in table.rows]
    kinds = [{row[n][1] for row in rows} - {"missing"} for n in range(len(table.heads))]
    return {"rows": rows, "heads": [(head, kind == {"number"}) for head, kind in zip(table.heads, kinds, strict=True)]}


def _sort_key(cell: Cell) -> tuple[str, str]:
    """Return the kind of the sort key ("missing", "number" or "text"), and the key in JavaScript's format."""
    key = cell.text if cell.sort is None else cell.sort
    if cell.text.strip() in ("", MISSING) or key != key:  # NaN differs from itself
        return "missing", ""
    return ("text", key) if isinstance(key, str) else ("number", repr(float(key)).replace("inf", "Infinity"))


def _axis(values: list[float], most: int = 8) -> tuple[float, float, list[tuple[float, str]]]:
    """Return both ends of an axis, slightly beyond the values, and its ticks, `most` + 1 at most, with their labels."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = 0.04 * (high - low) or 0.05 * abs(low) or 1.0
    low, high = low - pad, high + pad
    ticks = [float(t) for t in MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= t <= high]
    step = ticks[1] - ticks[0]
    decimals = next((d for d in range(7) if all(abs(round(t, d) - t) < step / 100 for t in ticks)), None)
    plain = decimals is not None and max(map(abs, ticks)) < 1e7
    return low, high, [(t, (f"{t:z,.{decimals}f}" if plain else f"{t:.5g}").replace("-", "−")) for t in ticks]


def _band(point: Point) -> tuple[float, ...]:
    """Return the ends of the point's error band; () without a band, whose ends are then None or NaN."""
    low, high = point.low, point.high
    return () if low is None or high is None or not math.isfinite(low + high) else (low, high)


def _marker(name: str) -> str:
    """Return matplotlib's outline of a marker as an SVG path around the origin; SVG's y axis points down."""
    style, letters = MarkerStyle(name), {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE4: "C"}
    parts = []
    for numbers, code in style.get_path().transformed(style.get_transform()).iter_segments(simplify=False):
        signed = (MARKER * (-value if n % 2 else value) + 0.0 for n, value in enumerate(numbers))
        parts.append("Z" if code == Outline.CLOSEPOLY else letters[code] + " ".join(f"{v:.2f}" for v in signed))
    return "".join(parts)
