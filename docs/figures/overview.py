"""A multi-exit network, and the cost that it saves: images exit early if an exit is confident enough."""

from __future__ import annotations

import csv
from pathlib import Path

from grammar import GREEN, INCH, INK, arrow, cascade, note
from matplotlib.figure import Figure

CURVE = Path(__file__).parent.parent / "results/cifar100/curve.csv"
ANYTIME = CURVE.with_name("anytime.csv")


def overview() -> Figure:
    """Draw the network and the images that leave at each exit; and joint training in study B."""
    figure = Figure(figsize=(18.2 * INCH, 5.4 * INCH))
    axes = figure.add_axes((0, 0, 11 / 18.2, 1))
    axes.set(xlim=(0, 11), ylim=(0, 5.4), aspect="equal")
    axes.axis("off")
    drawn = cascade(axes, (2.5, 0.9), gap=3.1, losses=False)
    groups = ("easy images", "harder images", "hardest images")
    for index, ((x, y), label) in enumerate(zip(drawn.heads, groups, strict=True)):
        arrow(axes, (x, y + 0.35), (x, y + 1.15), GREEN, width=1.4)
        note(axes, (x, y + 1.9), label, GREEN, fontweight="bold")
        note(axes, (x, y + 1.45), "exit if confident" if index < 2 else "all remaining exit", INK)
        if index < 2:
            note(axes, (x + 1.55, 0.45), "remaining\nimages", fontsize=7)
    _curve(figure)
    return figure


def _curve(figure: Figure) -> None:
    axes = figure.add_axes((0.69, 0.2, 0.29, 0.72))
    for path, cost, look, label in (
        (ANYTIME, "macs", {"color": "#8A8A8A", "marker": "s", "linestyle": "--"}, "one exit for all images"),
        (CURVE, "cost_mean", {"color": GREEN, "marker": ".", "linestyle": "-"}, "each image exits when confident"),
    ):
        with path.open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["method"] == "joint epochs=15"]
        points = [(float(row[cost]) / 1e6, float(row["accuracy_mean"])) for row in rows]
        axes.plot(*zip(*points, strict=True), label=label, markersize=4, linewidth=1.2, **look)
    axes.set_xlabel("multiply-adds per image (millions)")
    axes.set_ylabel("accuracy (%)")
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.3 * (high - low), high)  # room for the legend
    axes.legend(frameon=False, loc="lower right", fontsize=7)
    axes.tick_params(labelsize=7)
