"""The elements of all diagrams: one colour and one shape per kind of part.

Blue boxes are stages, orange boxes are heads, circles are losses. Black arrows show the forward pass, dashed red arrows
show gradients, and green arrows show information that one exit gets from another. Grey parts are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

BLUE, ORANGE, RED, GREEN, GREY, INK = "#0072B2", "#D55E00", "#C22A1B", "#00805C", "#8A8A8A", "#222222"
PALE = {BLUE: "#DDEBF6", ORANGE: "#FCE7D8", GREY: "#ECECEC", GREEN: "#DDF2EA", INK: "#FFFFFF"}
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "mathtext.fontset": "stixsans",
    "svg.hashsalt": "exitkit",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
}
INCH = 0.42
"""Inches per unit of a drawing."""

Point = tuple[float, float]


def canvas(width: float, height: float, bottom: float = 0.0) -> tuple[Figure, Axes]:
    """Return an empty figure and axes of `width` x `height` units."""
    figure = Figure(figsize=(width * INCH, height * INCH))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(bottom, bottom + height)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes, at: Point, text: str, colour: str = BLUE, *, size: Point = (1.5, 0.9), dashed: bool = False
) -> None:
    """Draw a box with its centre at `at`."""
    (x, y), (w, h) = at, size
    patch = FancyBboxPatch(
        (x - w / 2, y - h / 2),
        w,
        h,
        boxstyle="round,pad=0,rounding_size=0.14",
        facecolor=PALE.get(colour, "white"),
        edgecolor=colour,
        linewidth=1.0,
        linestyle="--" if dashed else "-",
        zorder=3,
    )
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", color=INK, zorder=4)


def loss(axes: Axes, at: Point, text: str, colour: str = INK, radius: float = 0.36) -> None:
    """Draw a circle, for a loss or a sum."""
    axes.add_patch(Circle(at, radius, facecolor="white", edgecolor=colour, linewidth=0.9, zorder=3))
    axes.text(*at, text, ha="center", va="center", color=INK, fontsize=7.5, zorder=4)


def arrow(
    axes: Axes,
    start: Point,
    end: Point,
    colour: str = INK,
    *,
    bend: float = 0.0,
    dashed: bool = False,
    width: float = 1.0,
) -> None:
    """Draw an arrow; arrows of gradients are dashed."""
    patch = FancyArrowPatch(
        start,
        end,
        arrowstyle="-|>",
        mutation_scale=8,
        shrinkA=0,
        shrinkB=0,
        color=colour,
        linewidth=width,
        linestyle=(0, (3, 1.6)) if dashed else "-",
        connectionstyle=f"arc3,rad={bend}",
        zorder=2,
    )
    axes.add_patch(patch)


def note(axes: Axes, at: Point, text: str, colour: str = INK, **how: Any) -> None:
    """Write a label."""
    boxed = {"facecolor": "white", "edgecolor": "none", "pad": 0.8} if how.pop("over", False) else None
    given = {"ha": "center", "va": "center", "fontsize": 7.5} | how
    axes.text(*at, text, color=colour, bbox=boxed, zorder=5, **given)


@dataclass(frozen=True)
class Cascade:
    """The positions of the parts of a drawn cascade."""

    stages: list[Point]
    heads: list[Point]
    losses: list[Point]


def cascade(
    axes: Axes,
    at: Point,
    *,
    exits: int = 3,
    gap: float = 2.6,
    stages: Sequence[str] = (),
    heads: Sequence[str] = (),
    losses: bool = True,
    image: bool = True,
) -> Cascade:
    """Draw a chain of stages with a head on each, and a loss on each head.

    Args:
        axes: the axes to draw on.
        at: centre of the first stage.
        exits: number of exits.
        gap: distance between the centres of neighbouring stages.
        stages: colour of each stage; none: all blue.
        heads: colour of each head; none: all orange.
        losses: draw the losses.
        image: draw the input image.
    """
    x, y = at
    columns = [x + gap * index for index in range(exits)]
    drawn = Cascade([(c, y) for c in columns], [(c, y + 1.5) for c in columns], [(c, y + 2.85) for c in columns])
    if image:
        note(axes, (x - 1.55, y), "$x$", fontsize=9)
        arrow(axes, (x - 1.35, y), (x - 0.75, y))
    for index, column in enumerate(columns):
        box(axes, (column, y), f"stage {index + 1}", stages[index] if stages else BLUE)
        box(axes, (column, y + 1.5), f"head {index + 1}", heads[index] if heads else ORANGE, size=(1.5, 0.7))
        arrow(axes, (column, y + 0.45), (column, y + 1.15))
        if index:
            arrow(axes, (column - gap + 0.75, y), (column - 0.75, y))
        if losses:
            arrow(axes, (column, y + 1.85), (column, y + 2.49))
            loss(axes, (column, y + 2.85), f"$L_{index + 1}$")
    return drawn


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG; the same figure always gives the same bytes."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(
            path, format="svg", facecolor="white", bbox_inches="tight", pad_inches=0.04, metadata={"Date": None}
        )
