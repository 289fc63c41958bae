"""The figures of `exitkit diagnose`, from the probes of a run and the values of `measures`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from exitkit.benchmarks.diagnose.toy import BEST, SIZES, losses
from exitkit.benchmarks.report.drawing import Axes, Figure, MaxNLocator, Normalize, SymLogNorm, own_style
from exitkit.benchmarks.report.figures import COLOURS, DASHES, HEIGHT, MARKERS, WIDTH

Probes = Mapping[str, np.ndarray]


def conflict_figure(probes: Probes) -> Figure:
    """Plot the cosine of the exits' gradients: mean per stage and epoch, and per pair of exits at the last probe."""
    cosine, epochs = probes["cosine"], probes["epoch"]
    exits = cosine.shape[-1]
    pairs = np.triu_indices(exits, 1)
    with own_style():
        figure = Figure(figsize=(2 * WIDTH, HEIGHT), layout="constrained")
        lines, table = figure.subplots(1, 2)
        for stage in range(exits):
            values = cosine[:, stage][:, pairs[0], pairs[1]]
            if not np.isnan(values).all():
                _line(lines, epochs, _mean(values), stage, f"stage {stage + 1}")
        lines.axhline(0, color="#888888", lw=0.6)
        _finish(lines, "epoch", "mean cosine of two exits' gradients")
        _matrix(figure, table, cosine[-1, 0], "cosine in stage 1, last probe", "exit", "exit", (-1.0, 1.0))
    return figure


def magnitude_figure(probes: Probes) -> Figure:
    """Plot the norm of the gradient of each stage, and its variance over batches."""
    with own_style():
        figure = Figure(figsize=(2 * WIDTH, HEIGHT), layout="constrained")
        panels = figure.subplots(1, 2)
        named = {"total_norm": "norm of the gradient", "total_variance": "variance of the gradient"}
        for axes, (name, label) in zip(panels, named.items(), strict=True):
            for stage in range(probes[name].shape[1]):
                _line(axes, probes["epoch"], probes[name][:, stage], stage, f"stage {stage + 1}")
            axes.set_yscale("log")
            _finish(axes, "epoch", label, legend=False)
        _legend_above(figure, panels[0])
    return figure


def validity_figure(probes: Probes) -> Figure:
    """Plot the fraction of valid images of each exit (probability of their class below 0.9), and its loss."""
    with own_style():
        figure = Figure(figsize=(2 * WIDTH, HEIGHT), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, (name, scale, label) in zip(
            panels, [("valid", 100, "valid images (%)"), ("loss", 1, "loss")], strict=True
        ):
            for index in range(probes[name].shape[1]):
                _line(axes, probes["epoch"], scale * probes[name][:, index], index, f"exit {index + 1}")
            _finish(axes, "epoch", label, legend=False)
        panels[0].set_ylim(top=min(panels[0].get_ylim()[1], 101))
        _legend_above(figure, panels[0])
    return figure


def weights_figure(probes: Probes) -> Figure:
    """Plot the weight of each image at each exit against its loss at that exit, for the last probe."""
    losses, weights = probes["losses"][-1], probes["weights"][-1]
    exits = losses.shape[1]
    with own_style():
        figure = Figure(figsize=(1.5 * exits + 0.4, 2.0), layout="constrained")
        panels = figure.subplots(1, exits, sharey=True, squeeze=False)[0]
        for index, axes in enumerate(panels):
            axes.scatter(losses[:, index], weights[:, index], s=5, color=COLOURS[0], alpha=0.6, lw=0)
            axes.axhline(1, color="#888888", lw=0.6)
            axes.set_title(f"exit {index + 1}")
            _finish(axes, "loss", "weight" if index == 0 else "", legend=False)
    return figure


def ranks_figure(correlation: np.ndarray) -> Figure:
    """Plot the rank correlation [K, K] of the exits' confidences."""
    with own_style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        title = "rank correlation of confidences"
        least = -1.0 if np.nanmin(correlation) < 0 else 0.0
        _matrix(figure, figure.subplots(), correlation, title, "exit", "exit", (least, 1.0))
    return figure


def pruning_figure(damage: np.ndarray) -> Figure:
    """Plot the accuracy [K, K] that each exit loses when the parameters most important to one exit are set to zero."""
    with own_style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        top = max(float(np.abs(damage).max()), 1.0)
        title = "accuracy lost (points)"
        # A few exits lose most of their accuracy, the others little: both differences are to be seen.
        norm = SymLogNorm(linthresh=1, linscale=0.5, vmin=-top, vmax=top, base=10)
        _matrix(figure, figure.subplots(), damage, title, "evaluated exit", "pruned for exit", norm, "{:.1f}")
    return figure


def toy_figure(paths: Mapping[str, np.ndarray]) -> Figure:
    """Plot the path of each method over the contours of both exits' losses, one panel per method."""
    columns = 5
    rows = -(-len(paths) // columns)
    side = np.linspace(-2.3, 2.3, 121)
    grid = torch.from_numpy(np.stack(np.meshgrid(side, side), -1))
    first, second = (values.numpy() for values in losses(grid))
    with own_style():
        figure = Figure(figsize=(1.5 * columns, 1.65 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[len(paths) :]:
            axes.set_visible(False)
        for axes, (name, points) in zip(panels.flat, paths.items(), strict=False):
            for values, size, colour in zip((first, second), SIZES, COLOURS, strict=False):
                levels = [size * level for level in (0.05, 0.25, 1, 3)]
                axes.contour(side, side, values, levels=levels, colors=colour, linewidths=0.4, alpha=0.7)
            for number, (optimum, colour) in enumerate(zip(BEST, COLOURS, strict=False), 1):
                axes.plot(*optimum, "*", color=colour, ms=6, mec="white", mew=0.3, label=f"best for exit {number}")
            axes.plot(points[:, 0], points[:, 1], color="black", lw=1.0)
            axes.plot(points[::10, 0], points[::10, 1], ".", color="black", ms=2.5, label="every tenth step")
            axes.plot(*points[0], "o", color="black", ms=3.5)
            axes.plot(*points[-1], "X", color="black", ms=5, mec="white", mew=0.4)
            axes.set_title(name)
            axes.set_aspect("equal")
        for axes in panels.flat[max(len(paths) - columns, 0) : len(paths)]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("$w_1$", parse_math=True)
        for row in panels:
            row[0].set_ylabel("$w_2$", parse_math=True)
        stars, _ = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles=stars, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, index: int, label: str) -> None:
    style: dict[str, Any] = {"color": COLOURS[index % 7], "marker": MARKERS[index % 8], "linestyle": DASHES[index % 5]}
    axes.plot(x, y, label=label, markevery=max(len(x) // 8, 1), markeredgecolor="white", markeredgewidth=0.4, **style)


def _finish(axes: Axes, x: str, y: str, legend: bool = True) -> None:
    axes.set_xlabel(x)
    if x == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_ylabel(y)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if legend:
        axes.legend(frameon=False, ncols=2, columnspacing=1.0, handlelength=2.2)


def _legend_above(figure: Figure, axes: Axes) -> None:
    """Add the legend of some axes above the panels, with at most seven names per line."""
    handles, labels = axes.get_legend_handles_labels()
    columns = -(-len(labels) // -(-len(labels) // 7))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, handlelength=2.2)


def _matrix(
    figure: Figure,
    axes: Axes,
    values: np.ndarray,
    title: str,
    x: str,
    y: str,
    scale: tuple[float, float] | Normalize,
    form: str = "{:.2f}",
) -> None:
    """Plot a square matrix as an image, with each value as text; `scale`: its limits, or how values become colours."""
    norm = scale if isinstance(scale, Normalize) else Normalize(*scale)
    diverging = norm.vmin is not None and norm.vmin < 0
    image = axes.imshow(values, cmap="RdBu_r" if diverging else "Blues", norm=norm)
    ticks = range(len(values))
    size = min(6.5, 45 / len(values))  # font size in points; larger numbers would overlap for many exits
    axes.set_xticks(ticks, [str(tick + 1) for tick in ticks])
    axes.set_yticks(ticks, [str(tick + 1) for tick in ticks])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for row in ticks:
        for column in ticks:
            if np.isfinite(values[row, column]):
                shade = float(norm(values[row, column]))
                dark = abs(shade - 0.5) > 0.33 if diverging else shade > 0.6
                colour = "white" if dark else "black"
                text = form.format(values[row, column]).replace("-", "−")
                axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.85, format="{x:g}").outline.set_visible(False)


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over pairs of exits, [T, pairs] -> [T], without NaN: pairs with an exit that skips the stage."""
    count = (~np.isnan(values)).sum(1)
    mean: np.ndarray = np.where(count > 0, np.nansum(values, 1) / np.maximum(count, 1), np.nan)
    return mean
