"""Accuracy against multiply-adds, as a paper prints it: one panel a backbone and data set, one line a method.

Figures are made on matplotlib's objects, not on pyplot's global state, so that any thread may draw them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from exitkit.benchmarks.report.collect import GROUP, Comparison
from exitkit.benchmarks.report.layout import group_name, unit_for

# Okabe and Ito's colours, told apart by colour-blind readers; markers and dashes serve a grey print. The
# three lengths share no factor, so that the combination does not repeat for many methods.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (1.5, 1)), (0, (6, 1, 1, 1, 1, 1))]

WIDTH, HEIGHT = 3.4, 2.6
"""Size of a panel in inches: a column of a two-column paper."""

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8.5,
    "axes.titlesize": 8.5,
    "legend.fontsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "grid.linewidth": 0.4,
    "grid.color": "#DDDDDD",
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}


def anytime_figure(comparison: Comparison) -> Figure:
    """Draw the accuracy of each exit against its multiply-adds; bands are one sd over seeds."""
    return _panels(comparison.anytime, "macs")


def budgeted_figure(comparison: Comparison) -> Figure:
    """Draw the papers' 39 budgeted-batch points at their realised mean cost; bands are one sd over seeds."""
    return _panels(comparison.curve, "cost_mean")


def save_figure(figure: Figure, path: Path, kind: str) -> None:
    """Save as "png" (300 dpi) or "pdf" (fonts embedded); the same figure gives the same bytes."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format=kind, metadata={"CreationDate" if kind == "pdf" else "Software": None})


def _panels(frame: pd.DataFrame, cost: str) -> Figure:
    methods = list(dict.fromkeys(frame["method"]))
    groups = [rows for _, rows in frame.groupby(GROUP, sort=False)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * len(groups), HEIGHT), layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for axes, rows in zip(panels, groups, strict=True):
            unit, size = unit_for(rows[cost])
            for place, method in enumerate(methods):
                mine = rows[rows["method"] == method]
                if len(mine):
                    _draw(axes, mine, cost, size, place)
            axes.set_title(group_name(rows))
            axes.set_xlabel(f"multiply-adds ({unit})" if unit else "multiply-adds")
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            axes.set_ylim(top=min(axes.get_ylim()[1], 100))
        panels[0].set_ylabel("accuracy (%)")
        _legend(figure, methods)
    return figure


def _look(place: int) -> dict[str, Any]:
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place % len(DASHES)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.4,
    }


def _draw(axes: Axes, rows: pd.DataFrame, cost: str, size: float, place: int) -> None:
    """Draw one method's line and a band of one sd; `place` is its place among all methods."""
    x, y, sd = rows[cost] / size, rows["accuracy_mean"], rows["accuracy_sd"]
    look = _look(place)
    # On a curve of many points the methods' markers fall on different ones, since curves often run together.
    every = (2 * place % 6, 6) if cost == "cost_mean" else 1
    axes.plot(x, y, label=rows["method"].iloc[0], markevery=every, **look)
    axes.fill_between(x, y - sd, y + sd, color=look["color"], alpha=0.12, lw=0)


def _legend(figure: Figure, methods: list[str]) -> None:
    """Put one legend above the panels, where it covers no data, in as many columns as the width holds."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    widths = {n: _legend_width(methods, n) for n in range(len(methods), 0, -1)}
    columns = next((n for n, width in widths.items() if width < figure.get_figwidth()), 1)
    figure.legend(
        [found[name] for name in methods],
        methods,
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        handlelength=2.4,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _legend_width(names: list[str], columns: int) -> float:
    """Estimate a legend's width in inches: a line and its spaces, then 4.6 points a letter."""
    stacks = np.array_split(np.array(names), columns)
    return float(sum(33 + 4.6 * max(map(len, stack)) for stack in stacks)) / 72
