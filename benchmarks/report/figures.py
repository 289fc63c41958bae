"""Figures of accuracy against cost: one panel per backbone and data set, one line per method.

Many methods have a panel each, with the other methods in grey. A line far below all others leaves the panel at the
bottom, where its lowest value is written.

Figures use matplotlib's objects and not pyplot's global state, so that they can be drawn in any thread.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from exitkit.benchmarks.report.comparison import BASELINE, GROUP, Comparison
from exitkit.benchmarks.report.comparisons import baseline_of
from exitkit.benchmarks.report.drawing import STYLE, Axes, Figure, Line2D, MaxNLocator, SubFigure, own_style
from exitkit.benchmarks.report.statistics import SIGNIFICANCE, without_outliers
from exitkit.benchmarks.report.wide_tables import group_name, unit_for

# Okabe and Ito's colours, which colour-blind readers can distinguish; markers and dashes are for greyscale print. The
# lengths of the three lists are coprime, so that combinations repeat only after many methods.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (1.5, 1)), (0, (6, 1, 1, 1, 1, 1))]

WIDTH, HEIGHT = 3.4, 2.6
"""Size of a panel in inches: one column of a two-column paper."""
_LINE = 0.17  # height of one line of a legend, in inches
_LINES = 6  # largest number of lines of a legend above the panels
_LETTERS = 46  # characters per line of a panel's title
_LABEL = 30  # characters per line of a method's name beside a panel
_MANY = 8  # largest number of methods in one panel
_SMALL = 5  # small panels in a row
_OTHERS = "#CCCCCC"  # colour of the other methods in a small panel
_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # behind text on lines


def anytime_figure(comparison: Comparison) -> Figure:
    """Draw the accuracy of each exit against its cost; bands are one sd over seeds, crosses are static networks."""
    return _panels(comparison, comparison.anytime, comparison.cost_column, _add_static)


def budgeted_figure(comparison: Comparison) -> Figure:
    """Draw the budgeted-batch curves against the realised mean cost; bands are one sd over seeds."""
    return _panels(comparison, whole_curve(comparison), "cost_mean", _add_static)


def oracle_figure(comparison: Comparison) -> Figure:
    """Draw the budgeted curves and their upper bounds, those of an oracle that selects the best exit of each image.

    The oracle never spends more than its last point does. The bound continues at that accuracy up to the cost of the
    last exit, so that it is visible at every cost.
    """

    def bounds(axes: Axes, comparison: Comparison, shown: pd.DataFrame, size: float) -> None:
        axes.plot([], [], ":", color="#555555", lw=0.9, label="the best exit of each image")
        for line in [line for line in axes.lines if line.get_label() in set(shown["method"])]:
            rows = _same_group(comparison.oracle, shown)
            bound = oracle_range(comparison, rows[rows["method"] == line.get_label()])
            axes.plot(bound["cost_mean"] / size, bound["accuracy_mean"], ":", color=line.get_color(), lw=0.9)

    return _panels(comparison, whole_curve(comparison), "cost_mean", bounds)


def differences_figure(differences: pd.DataFrame) -> Figure:
    """Draw the differences to the baseline at the first and the last exit and in area, with their 95 % intervals.

    Each network and data set has a row of panels, with the first method at the top. Filled markers are significant
    after Holm's correction.

    Args:
        differences: rows of `Comparison.differences`.
    """
    groups = [rows for _, rows in differences.groupby(GROUP, sort=False)]
    names = [list(dict.fromkeys(rows["method"])) for rows in groups]
    labels = [[textwrap.fill(name, _LABEL) for name in methods] for methods in names]
    lines = [max(label.count("\n") + 1 for label in group) for group in labels]
    heights = [0.16 * len(group) * tall + 0.9 for group, tall in zip(labels, lines, strict=True)]
    with own_style():
        figure = Figure(figsize=(2 * WIDTH, sum(heights)), layout="constrained")
        panels = figure.subplots(len(groups), 3, sharey="row", squeeze=False, height_ratios=heights)
        for axes, rows, methods, texts in zip(panels, groups, names, labels, strict=True):
            exits = [measure for measure in dict.fromkeys(rows["measure"]) if measure != "area"]
            for panel, measure in zip(axes, (exits[0], exits[-1], "area"), strict=True):
                measured = rows[rows["measure"] == measure]
                _intervals(panel, measured, "method", methods)
                _limit_differences(panel, measured, methods)
                panel.set_title(measure)
            axes[0].set_yticks(range(len(methods)), texts)
            axes[0].set_ylim(len(methods) - 0.4, -0.6)
            axes[1].set_title(f"{textwrap.fill(group_name(rows), _LETTERS)}\n{exits[-1]}")
            label = f"difference to {rows['baseline'].iloc[0]} (percentage points)"
            axes[1].set_xlabel(textwrap.fill(label, 2 * _LETTERS))
    return figure


def policy_differences_figure(differences: pd.DataFrame) -> Figure:
    """Draw the mean differences of exit policies to plain confidence, with their 95 % intervals.

    Each method, network and data set has a panel. The policy with the largest difference, averaged over the panels, is
    at the top. Filled markers are significant after Holm's correction.

    Args:
        differences: the rows of `Comparison.policy_differences`.
    """
    groups = [rows for _, rows in differences.groupby(["method", *GROUP], sort=False)]
    several = len(differences[GROUP].drop_duplicates()) > 1
    policies = best_first(differences)
    across = _columns(len(groups), 4)
    down = -(-len(groups) // across)
    height = 0.16 * len(policies) + (0.9 if several else 0.6)
    with own_style():
        figure = Figure(figsize=(2 * WIDTH, height * down), layout="constrained")
        panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for axes in panels.ravel()[len(groups) :]:
            axes.axis("off")
        for axes, rows in zip(panels.ravel(), groups, strict=False):
            _intervals(axes, rows, "policy", policies)
            names = [rows["method"].iloc[0], group_name(rows)] if several else [rows["method"].iloc[0]]
            axes.set_title("\n".join(textwrap.fill(name, 2 * _LETTERS // across) for name in names))
        panels[0][0].set_yticks(range(len(policies)), [textwrap.fill(name, _LABEL) for name in policies])
        panels[0][0].set_ylim(len(policies) - 0.4, -0.6)
        size = panels[0][0].xaxis.label.get_size()
        figure.supxlabel("difference to confidence (percentage points)", fontsize=size)
    return figure


def best_first(differences: pd.DataFrame) -> list[str]:
    """Return the exit policies in the order of their mean differences, averaged over the methods; the largest first."""
    means = differences.groupby("policy", sort=False)["mean"].mean()
    return list(means.sort_values(ascending=False, kind="stable").index)


def _intervals(axes: Axes, rows: pd.DataFrame, column: str, order: list[str]) -> None:
    """Draw the difference and the interval of each name in `column` at its position in `order`."""
    for name, mean, low, high, p in rows[[column, "mean", "low", "high", "p_holm"]].itertuples(index=False):
        at = order.index(name)
        face = COLOURS[0] if p < SIGNIFICANCE else "white"
        axes.plot([low, high], [at, at], color=COLOURS[0], lw=1.0)
        axes.plot([mean], [at], "o", color=COLOURS[0], markerfacecolor=face, markeredgewidth=0.8)
    axes.axvline(0, color="#555555", lw=0.6, zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _limit_differences(axes: Axes, rows: pd.DataFrame, order: list[str]) -> None:
    """Set the limits of a panel of differences; those far from the others are cut off, and written at the edge."""
    low, high = without_outliers(rows["low"].fillna(rows["mean"]), rows["high"].fillna(rows["mean"]))
    low, high = min(low, 0), max(high, 0)
    room = 0.06 * (high - low)
    far = rows[~rows["mean"].between(low - 2 * room, high + 2 * room)]
    if far.empty or low == high:
        return
    axes.set_xlim(low - 2 * room, high + 2 * room)
    for name, mean, p in far[["method", "mean", "p_holm"]].itertuples(index=False):
        edge, inside, marker, side = (low, 1, "<", "left") if mean < low else (high, -1, ">", "right")
        face = COLOURS[0] if p < SIGNIFICANCE else "white"
        at = order.index(name)
        axes.plot([edge - inside * room], [at], marker, color=COLOURS[0], markerfacecolor=face, markeredgewidth=0.8)
        text = f"{mean:.1f}".replace("-", "−")
        axes.text(edge, at, text, ha=side, va="center", fontsize=6.5, color=COLOURS[0], bbox=_BOX)


def whole_curve(comparison: Comparison) -> pd.DataFrame:
    """Return the budgeted curves, continued to those budgets of the table that are beyond their ends.

    The rows of these budgets have a column `budget`, and no `point`.
    """
    keys = ["method", *GROUP]
    spent = comparison.budgeted.dropna(subset=["cost_mean"])
    ends = comparison.curve.groupby(keys)["cost_mean"].agg(["min", "max"]).reset_index()
    spent = spent.merge(ends, on=keys).drop_duplicates([*keys, "cost_mean"])
    below, above = spent[spent["cost_mean"] < spent["min"]], spent[spent["cost_mean"] > spent["max"]]
    rows = pd.concat([below, comparison.curve.assign(budget=np.nan), above], ignore_index=True)
    order = list(dict.fromkeys(comparison.curve["method"]))
    rows = rows.sort_values("method", key=lambda names: names.map(order.index), kind="stable", ignore_index=True)
    return rows.drop(columns=["min", "max"])


def oracle_range(comparison: Comparison, bound: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a method's upper bound, and one more at the cost of its last exit, with the same accuracy."""
    if bound.empty:
        return bound
    keys = ["method", *GROUP]
    same = (comparison.anytime[keys] == bound[keys].iloc[0]).all(axis=1)
    last = comparison.anytime.loc[same, comparison.cost_column].max()
    return pd.concat([bound, bound.tail(1).assign(cost_mean=last)], ignore_index=True)


def policies_figure(comparison: Comparison) -> Figure:
    """Draw the curves of exit policies, one panel per method, network and data set."""
    rows = comparison.policy_curve
    rows = rows.assign(backbone=rows["method"] + ", " + rows["backbone"], method=rows["policy"])
    return _panels(comparison, rows, "cost_mean", None, list(dict.fromkeys(rows["method"])))


def stitched_figure(comparison: Comparison) -> Figure:
    """Draw each method's combined curve of networks of several sizes, one panel per family and data set."""
    rows = comparison.stitched
    rows = rows.assign(backbone="all " + rows["family"] + "s")
    return _panels(comparison, rows, "cost_mean", None)


def learning_figure(learning: pd.DataFrame) -> Figure:
    """Draw the validation accuracy per epoch of up to four exits: a row per network and data set, a panel per exit."""
    groups = [rows for _, rows in learning.groupby(GROUP, sort=False)]
    methods = list(dict.fromkeys(learning["method"]))
    if len(methods) > _MANY:
        return _small_learning(groups)
    chosen = [_spread_over(sorted(rows["exit"].unique()), 4) for rows in groups]
    across = max(map(len, chosen))
    with own_style():
        figure = Figure(figsize=(1.75 * across, 1.75 * len(groups) + 0.35), layout="constrained")
        panels = figure.subplots(len(groups), across, squeeze=False)
        for line, (rows, exits) in enumerate(zip(groups, chosen, strict=True)):
            for axes, number in zip(panels[line], [*exits, *[None] * (across - len(exits))], strict=True):
                if number is None:
                    axes.axis("off")
                    continue
                for index, method in enumerate(methods):
                    curve = rows[(rows["method"] == method) & (rows["exit"] == number)]
                    style = _style(index) | {"marker": "" if len(curve) > 15 else _style(index)["marker"], "lw": 1.0}
                    axes.plot(curve["epoch"], curve["validation_accuracy_mean"], label=method, **style)
                title = f"exit {number}" if len(groups) == 1 else f"exit {number}, {group_name(rows)}"
                axes.set_title(textwrap.fill(title, 24), fontsize=7)
                axes.set_xlabel("epoch")
                axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
                axes.grid(axis="y")
            panels[line][0].set_ylabel("validation accuracy (%)")
        _legend(figure, methods)
    return figure


def _small_learning(groups: list[pd.DataFrame]) -> Figure:
    """Draw a small panel per method with up to four of its exits."""
    names = [list(dict.fromkeys(rows["method"])) for rows in groups]
    with own_style():
        figure, parts = _grids(groups, names, sharex=False)
        chosen = [_spread_over(sorted(rows["exit"].unique()), 4) for rows in groups]
        numbers = sorted(set().union(*chosen))
        colours = {exit: COLOURS[n % len(COLOURS)] for n, exit in enumerate(numbers)}
        for (part, panels), rows, exits in zip(parts, groups, chosen, strict=True):
            rows = rows.rename(columns={"epoch": "x", "validation_accuracy_mean": "accuracy_mean"})
            for axes, method in zip(panels, dict.fromkeys(rows["method"]), strict=True):
                for exit in exits:
                    curve = rows[(rows["method"] == method) & (rows["exit"] == exit)]
                    axes.plot(curve["x"], curve["accuracy_mean"], color=colours[exit], lw=0.9, label=f"exit {exit}")
                axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
            _limit(panels, rows[rows["exit"].isin(exits)])
            for axes in panels:
                bottom, _ = axes.get_ylim()
                tops = [np.asarray(line.get_ydata(), dtype=np.float64).max() for line in axes.lines]
                below = [str(exit) for exit, top in zip(exits, tops, strict=True) if top < bottom]
                if below:
                    text = f"↓ exit {', '.join(below)}"
                    axes.text(0.98, 0, text, ha="right", va="bottom", fontsize=6.5, transform=axes.transAxes)
            part.supxlabel("epoch", fontsize=STYLE["axes.labelsize"])
            part.supylabel("validation accuracy (%)", fontsize=STYLE["axes.labelsize"])
        shown = {label: line for _, panels in parts for label, line in _handles(panels[0]).items()}
        _legend_above(figure, {f"exit {exit}": shown[f"exit {exit}"] for exit in colours})
    return figure


def sweep_figure(sweep: pd.DataFrame) -> Figure:
    """Draw accuracy against the values of a swept field: one panel per method and field, one line per exit."""
    groups = [(names, rows) for names, rows in sweep.groupby(["method", "field", *GROUP], sort=False)]
    exits = _spread_over(sorted(sweep["exit"].unique()), 5)
    with own_style():
        figure = Figure(figsize=(WIDTH * len(groups), HEIGHT), layout="constrained")
        for axes, (names, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
            for index, number in enumerate(exits):
                curve = rows[rows["exit"] == number].sort_values("value")
                axes.errorbar(
                    curve["value"],
                    curve["accuracy_mean"],
                    curve["accuracy_sd"].fillna(0),
                    label=f"exit {number}",
                    capsize=2,
                    elinewidth=0.6,
                    **_style(index),
                )
            axes.set_title(textwrap.fill(f"{names[0]}, {names[2]} on {names[3]}", _LETTERS))
            axes.set_xlabel(str(names[1]).replace("_", " "))
            if (rows["value"] % 1 == 0).all():  # integer fields get integer ticks
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.grid(axis="y")
        figure.axes[0].set_ylabel("accuracy (%)")
        _legend(figure, [f"exit {number}" for number in exits])
    return figure


def _spread_over(values: list[int], limit: int) -> list[int]:
    """Return at most `limit` evenly spaced values, including the first and the last."""
    if len(values) <= limit:
        return values
    return [values[round(index)] for index in np.linspace(0, len(values) - 1, limit)]


def _methods(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(comparison.anytime["method"]))


def _same_group(rows: pd.DataFrame, shown: pd.DataFrame) -> pd.DataFrame:
    """Return those `rows` that are of the network and the data set of `shown`."""
    return rows[(rows[GROUP] == shown[GROUP].iloc[0]).all(axis=1)]


def _add_static(axes: Axes, comparison: Comparison, shown: pd.DataFrame, size: float) -> None:
    static = _same_group(comparison.static, shown)
    if len(static):
        axes.plot(
            static["cost_mean"] / size,
            static["accuracy_mean"],
            "x",
            color="#555555",
            ms=5,
            mew=1.2,
            label="static networks",
        )


Extra = Callable[[Axes, Comparison, pd.DataFrame, float], None]
"""Draws on a panel, given its axes, the comparison, the rows that it shows, and the size of the unit of cost."""


def _panels(
    comparison: Comparison, frame: pd.DataFrame, cost: str, extra: Extra | None, lines: list[str] | None = None
) -> Figure:
    """Draw a panel per network and data set, with a line per method; `lines` names the lines, if not the methods."""
    names = _methods(comparison) if lines is None else lines
    methods = [method for method in names if method in set(frame["method"])]
    groups = [rows for _, rows in frame.groupby(GROUP, sort=False)]
    if lines is None and any(rows["method"].nunique() > _MANY for rows in groups):
        return _small_panels(comparison, groups, methods, cost, extra)
    across = _columns(len(groups), 3)
    down = -(-len(groups) // across)
    with own_style():
        figure = Figure(figsize=(WIDTH * across, HEIGHT * down), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False)
        for axes in panels.ravel()[len(groups) :]:
            axes.axis("off")
        for axes, rows in zip(panels.ravel(), groups, strict=False):
            label, size = axis_of(comparison, rows[cost])
            for index, method in enumerate(names):
                # The costs of consecutive points of a learned exit policy may rise and fall.
                curve = rows[rows["method"] == method].sort_values(cost, kind="stable")
                if len(curve):
                    _draw(axes, curve, cost, size, index)
            if extra:
                extra(axes, comparison, rows, size)
            axes.set_title(textwrap.fill(group_name(rows), _LETTERS))
            axes.set_xlabel(label)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            _limit([axes], rows.assign(x=rows[cost] / size))
        for line in panels:
            line[0].set_ylabel("accuracy (%)")
        labels = [text for axes in figure.axes for text in axes.get_legend_handles_labels()[1]]
        _legend(figure, methods + [name for name in dict.fromkeys(labels) if name not in methods])
    return figure


def _small_panels(
    comparison: Comparison, groups: list[pd.DataFrame], methods: list[str], cost: str, extra: Extra | None
) -> Figure:
    """Draw a small panel per method: its line, that of the baseline, and those of all other methods in grey."""
    names = [[method for method in methods if method in set(rows["method"])] for rows in groups]
    baselines = [baseline_of(methods, comparison.options.baseline or BASELINE) for methods in names]
    shown = [[name for name in group if name != base] or group for group, base in zip(names, baselines, strict=True)]
    with own_style():
        figure, parts = _grids(groups, shown)
        for (part, panels), rows, order, baseline in zip(parts, groups, shown, baselines, strict=True):
            label, size = axis_of(comparison, rows[cost])
            rows = rows.assign(x=rows[cost] / size)
            curves = {name: curve.sort_values("x", kind="stable") for name, curve in rows.groupby("method")}
            for axes, method in zip(panels, order, strict=True):
                for curve in curves.values():
                    axes.plot(curve["x"], curve["accuracy_mean"], color=_OTHERS, lw=0.5, zorder=1)
                _draw_plain(axes, curves[baseline], {"color": "black", "linestyle": (0, (3, 1))})
                _draw_plain(axes, curves[method], {"color": COLOURS[0], "marker": "" if cost == "cost_mean" else "."})
                if extra:
                    extra(axes, comparison, rows[rows["method"].isin([method, baseline])], size)
            _limit(panels, rows)
            part.supxlabel(label, fontsize=STYLE["axes.labelsize"])
            part.supylabel("accuracy (%)", fontsize=STYLE["axes.labelsize"])
        one = len(set(baselines)) == 1
        if not one:
            for (part, _), rows, baseline in zip(parts, groups, baselines, strict=True):
                part.suptitle(f"{group_name(rows)}; dashed: {baseline}", fontsize=STYLE["axes.titlesize"])
        _, panels = max(parts, key=lambda part: len(part[1]))
        first, own, *_ = _handles(panels[0]).values()
        named = {baselines[0] if one else "the baseline": first, "the method of the panel": own}
        named["other methods"] = Line2D([], [], color=_OTHERS, lw=0.5)
        for _, panels in parts:
            named |= {label: line for label, line in _handles(panels[0]).items() if label not in methods}
        _legend_above(figure, named)
    return figure


def _grids(
    groups: list[pd.DataFrame], methods: list[list[str]], sharex: bool = True
) -> tuple[Figure, list[tuple[SubFigure, list[Axes]]]]:
    """Return a figure with a part per network and data set, and in each a small panel per method, with its name."""
    down = [-(-len(names) // _SMALL) for names in methods]
    titles = [[textwrap.fill(name, 20) for name in names] for names in methods]
    longest = [[max(some[n : n + _SMALL], key=_lines) for n in range(0, len(some), _SMALL)] for some in titles]
    heights = [0.97 * rows + 0.13 * sum(map(_lines, some)) + 0.6 for rows, some in zip(down, longest, strict=True)]
    figure = Figure(figsize=(2 * WIDTH, sum(heights)), layout="constrained")
    parts = []
    figures = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, rows, names, height in zip(figures, groups, titles, down, strict=True):
        grid = part.subplots(height, _SMALL, sharex=sharex, sharey=True, squeeze=False).ravel()
        for axes, name in zip(grid, names, strict=False):
            axes.set_title(name, fontsize=7)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        for axes in grid[len(names) :]:
            axes.axis("off")
        for axes in grid[max(len(names) - _SMALL, 0) : len(names)]:
            axes.tick_params(labelbottom=True)
        part.suptitle(group_name(rows), fontsize=STYLE["axes.titlesize"])
        parts.append((part, list(grid[: len(names)])))
    return figure, parts


def _lines(text: str) -> int:
    return text.count("\n") + 1


def _draw_plain(axes: Axes, rows: pd.DataFrame, style: dict[str, Any]) -> None:
    """Draw a method's line in a small panel, and a band of one sd."""
    mean, sd = rows["accuracy_mean"], rows["accuracy_sd"]
    axes.plot(rows["x"], mean, label=rows["method"].iloc[0], lw=1.0, **style)
    axes.fill_between(rows["x"], mean - sd, mean + sd, color=style["color"], alpha=0.15, lw=0)


def _limit(panels: list[Axes], rows: pd.DataFrame) -> None:
    """Set the limits of accuracy of panels that share them, for the methods' lines in `rows`: their `x` and means.

    A line far below the others is cut off, and its lowest value is written at the bottom.
    """
    means = rows.groupby("method", sort=False)["accuracy_mean"]
    bottom, _ = without_outliers(means.min(), means.max().max())
    if bottom <= means.min().min():
        for axes in panels:
            axes.set_ylim(top=min(axes.get_ylim()[1], 100))
        return
    top = max(axes.dataLim.y1 for axes in panels)
    room = 0.05 * (top - bottom)
    lowest = rows.loc[means.idxmin(), ["method", "x", "accuracy_mean"]]
    for axes in panels:
        axes.set_ylim(bottom - room, min(top + room, 100))
        left, right = axes.get_xlim()
        lines = _handles(axes)
        for name, x, y in lowest[lowest["accuracy_mean"] < bottom].itertuples(index=False):
            if name in lines:
                side = "left" if x < (2 * left + right) / 3 else "right" if x > (left + 2 * right) / 3 else "center"
                colour = lines[name].get_color()
                style = {"fontsize": 6.5, "color": colour, "bbox": _BOX, "zorder": 2.4}  # above lines, below axes
                axes.text(x, bottom - room, f"↓ {y:.1f}", ha=side, va="bottom", **style)


def _handles(axes: Axes) -> dict[str, Any]:
    """Return what a legend of these axes shows: {label: line}."""
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def _columns(panels: int, limit: int) -> int:
    """Return the number of panels in a row, at most `limit`: the rows are as few and as equal as possible."""
    return -(-panels // -(-panels // limit))


def axis_of(comparison: Comparison, costs: pd.Series) -> tuple[str, float]:
    """Return the label of a cost axis, with its unit, and the size of that unit."""
    if comparison.options.cost == "latency":
        return "milliseconds per image", 1.0
    unit, size = unit_for(costs)
    papers = ", papers' count" if comparison.options.cost == "papers" else ""
    return f"multiply-adds{papers} ({unit})" if unit else f"multiply-adds{papers}", size


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.4,
    }


def _draw(axes: Axes, rows: pd.DataFrame, cost: str, size: float, index: int) -> None:
    """Draw the line of one method and a band of one sd; `index` is its position among all methods."""
    x, y, sd = rows[cost] / size, rows["accuracy_mean"], rows["accuracy_sd"]
    style = _style(index)
    # On curves of many points, methods have markers on different points, since their curves often overlap.
    every = (2 * index % 6, 6) if cost == "cost_mean" else 1
    axes.plot(x, y, label=rows["method"].iloc[0], markevery=every, **style)
    axes.fill_between(x, y - sd, y + sd, color=style["color"], alpha=0.12, lw=0)


def _legend(figure: Figure, methods: list[str]) -> None:
    """Add one legend above the panels, in as many columns as fit, or beside them if it would have many lines."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = _legend_columns(figure, methods)
    lines = -(-len(methods) // columns)
    beside = lines > _LINES
    if beside:
        columns = 1
        width, height = figure.get_figwidth() + _legend_width(methods, 1) + 0.1, _LINE * (len(methods) + 1)
        figure.set_size_inches(width, max(figure.get_figheight(), height))
    else:
        figure.set_figheight(figure.get_figheight() + _LINE * (lines - 1))  # keeps the height of the panels
    figure.legend(
        [handles[name] for name in methods],
        methods,
        loc="outside right center" if beside else "outside upper center",
        ncols=columns,
        frameon=False,
        handlelength=2.4,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _legend_above(figure: Figure, lines: dict[str, Any]) -> None:
    """Add a legend above all panels, in as many columns as fit."""
    names = list(lines)
    columns = _legend_columns(figure, names)
    figure.legend(lines.values(), names, loc="outside upper center", ncols=columns, frameon=False)


def _legend_columns(figure: Figure, names: list[str]) -> int:
    """Return the largest number of a legend's columns that fit into the figure's width."""
    columns = range(len(names), 0, -1)
    return next((n for n in columns if _legend_width(names, n) < figure.get_figwidth()), 1)


def _legend_width(names: list[str], columns: int) -> float:
    """Estimate the width of a legend in inches: 33 points per handle and 4.6 points per character."""
    stacks = np.array_split(np.array(names), columns)
    return float(sum(33 + 4.6 * max(map(len, stack)) for stack in stacks)) / 72
