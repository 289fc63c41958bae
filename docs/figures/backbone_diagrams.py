"""The structure of each family of networks."""

from __future__ import annotations

from grammar import BLUE, GREEN, GREY, ORANGE, PALE, arrow, box, canvas, note
from matplotlib.figure import Figure
from matplotlib.patches import Circle


def msdnet() -> Figure:
    """Layers at three scales; the finest scales are dropped along the depth; heads read the coarsest."""
    figure, axes = canvas(15.2, 6.4)
    layers, alive = 7, (0, 0, 0, 1, 1, 2, 2)
    place = {(layer, scale): (2.6 + 1.7 * layer, 5.6 - 1.55 * scale) for layer in range(layers) for scale in range(3)}
    for (layer, scale), (x, y) in place.items():
        if scale < alive[layer]:
            continue
        if layer and scale >= alive[layer - 1]:
            arrow(axes, (x - 1.34, y), (x - 0.36, y))
        if scale and (scale - 1 >= (alive[layer - 1] if layer else 0)):
            if layer:
                left, top = place[(layer - 1, scale - 1)]
                arrow(axes, (left + 0.26, top - 0.26), (x - 0.26, y + 0.26), BLUE)
            else:
                arrow(axes, (x, y + 1.19), (x, y + 0.36), BLUE)
        axes.add_patch(Circle((x, y), 0.36, facecolor=PALE[BLUE], edgecolor=BLUE, zorder=3))
        note(axes, (x, y), f"{16 // 2**scale}²" if not layer else "", fontsize=6.5)
    for number, layer in enumerate((2, 4, 6), start=1):
        x, y = place[(layer, 2)]
        arrow(axes, (x, y - 0.36), (x, y - 0.95))
        box(axes, (x, y - 1.3), f"head {number}", ORANGE, size=(1.35, 0.66))
    for scale, name in enumerate(("fine", "", "coarse")):
        note(axes, (0.6, 5.6 - 1.55 * scale), name, GREY)
    note(axes, (0.75, 4.75), "$x$", fontsize=9)
    arrow(axes, (0.95, 4.85), (2.25, 5.5))
    note(axes, (10.4, 6.2), "the finest scales are dropped along the depth", GREY)
    note(axes, (2.6, 1.75), "stem", GREY)
    for start, end in ((3.55, 6.65), (6.95, 10.05), (10.35, 13.45)):
        axes.plot([start, end], [0.18, 0.18], color=BLUE, linewidth=1.4)
    for number, x in enumerate((5.1, 8.5, 11.9), start=1):
        note(axes, (x, -0.04), f"stage {number}", BLUE, va="top")
    axes.set_ylim(-0.5, 6.5)
    return figure


def ranet() -> Figure:
    """Sub-networks from low to high resolution, each of which fuses the one below."""
    figure, axes = canvas(15.4, 6.6)
    rows = ((1, "low resolution", 2, 5.4), (2, "middle", 3, 3.5), (3, "high resolution", 4, 1.6))
    number = 0
    for level, name, blocks, y in rows:
        box(axes, (2.9, y), "stem\nfeature", GREY, size=(1.35, 0.95))
        note(axes, (1.1, y), name, GREY)
        for index in range(blocks):
            x = 5.4 + 2.4 * index
            fused = level > 1 and index < blocks - 1
            box(axes, (x, y), "fuse" if fused else "block", GREEN if fused else BLUE, size=(1.4, 0.8))
            arrow(axes, (x - 1.82 if not index else x - 1.7, y), (x - 0.7, y))
            if fused:
                arrow(axes, (x, y + 1.5), (x, y + 0.4), GREEN)
            if (level == 1) or index == blocks - 1:
                number += 1
                arrow(axes, (x + 0.4, y + 0.4), (x + 0.75, y + 0.62), ORANGE)
                box(axes, (x + 1.2, y + 0.85), f"head {number}", ORANGE, size=(1.35, 0.55))
    arrow(axes, (2.9, 2.08), (2.9, 3.02))
    arrow(axes, (2.9, 3.98), (2.9, 4.92))
    note(axes, (2.9, 0.55), "$x$", fontsize=9)
    arrow(axes, (2.9, 0.72), (2.9, 1.12))
    note(axes, (9.4, 0.6), "the next sub-network runs only if no earlier exit was confident enough", GREY)
    return figure


def sdn() -> Figure:
    """A plain trunk with internal classifiers."""
    figure, axes = canvas(15.4, 4.0)
    note(axes, (0.5, 0.75), "$x$", fontsize=9)
    for index in range(6):
        x = 1.75 + 2.15 * index
        box(axes, (x, 0.75), f"unit {index + 1}", BLUE, size=(1.4, 0.8))
        arrow(axes, (x - (0.98 if not index else 1.45), 0.75), (x - 0.7, 0.75))
        if index in (1, 3):
            arrow(axes, (x, 1.15), (x, 1.75))
            box(axes, (x, 2.25), r"$\alpha\,$max + (1 – $\alpha$) mean" "\nto 4×4, linear", ORANGE, size=(3.4, 1.0))
            arrow(axes, (x, 2.75), (x, 3.3))
            note(axes, (x, 3.5), f"exit {(index + 1) // 2}")
    arrow(axes, (13.2, 0.75), (13.7, 0.75))
    box(axes, (14.5, 0.75), "trunk's\nown head", ORANGE, size=(1.6, 0.9))
    arrow(axes, (14.5, 1.2), (14.5, 3.3))
    note(axes, (14.5, 3.5), "exit 3")
    return figure


def attach() -> Figure:
    """A user's network, cut behind named points, with new heads; its own classifier is the last exit."""
    figure, axes = canvas(15.4, 4.3)
    names = ("conv1", "layer1", "layer2", "layer3", "fc")
    note(axes, (0.5, 0.9), "$x$", fontsize=9)
    for index, name in enumerate(names):
        x = 1.9 + 2.7 * index
        box(axes, (x, 0.9), name, BLUE if name != "fc" else ORANGE, size=(1.5, 0.85))
        arrow(axes, (x - (1.15 if not index else 1.95), 0.9), (x - 0.75, 0.9))
        if name in ("layer1", "layer2"):
            cut = x + 1.35
            axes.plot([cut, cut], [0.2, 1.7], color=GREEN, linewidth=1.4, linestyle="--")
            arrow(axes, (cut, 1.7), (cut, 2.25))
            box(axes, (cut, 2.65), "mean over the\nmap, linear", ORANGE, size=(2.3, 0.95), dashed=True)
            arrow(axes, (cut, 3.12), (cut, 3.6))
            note(axes, (cut, 3.82), f"exit {index}")
    arrow(axes, (12.7, 1.33), (12.7, 3.6))
    note(axes, (12.7, 3.97), "exit 3: the model's own\nlogits, bit for bit")
    note(axes, (2.0, 2.3), 'at=["layer1", "layer2"]', GREEN, family="monospace")
    note(axes, (2.0, 1.85), "or fractions of the cost", GREEN)
    return figure
