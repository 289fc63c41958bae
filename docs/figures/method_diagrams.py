"""One diagram per page of methods, of the part of training that the method changes."""

from __future__ import annotations

import numpy as np
from grammar import BLUE, GREEN, GREY, INK, ORANGE, RED, Point, arrow, box, canvas, cascade, loss, note
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def joint() -> Figure:
    """The losses are summed; the gradients of all later exits add up in each stage."""
    figure, axes = canvas(11.6, 4.2)
    drawn = cascade(axes, (2.4, 0.75))
    box(axes, (10.4, 3.6), r"$\sum_k a_k L_k$", INK, size=(1.7, 0.9))
    for index, (x, y) in enumerate(drawn.losses):
        if index < 2:
            arrow(axes, (x + 0.3, y + 0.2), (9.55, 3.75), bend=-0.12)
        else:
            arrow(axes, (x + 0.36, y), (9.55, 3.6))
        _down(axes, (x, y))
        if index:
            arrow(axes, (x - 0.78, 0.5), (x - 1.82, 0.5), RED, dashed=True, width=0.6 + 0.5 * (3 - index))
    note(axes, (4.95, 0.12), "gradients of all later exits add up", RED)
    return figure


def ge() -> Figure:
    """Two factors at every boundary; every exit reaches a stage with the same factor."""
    figure, axes = canvas(13.6, 4.3)
    drawn = cascade(axes, (2.4, 0.85), losses=True)
    for index, (x, y) in enumerate(drawn.losses):
        _down(axes, (x, y))
        share = ("1/3", "1/2", "1")[index]
        note(axes, (x + 0.32, 1.62), rf"$\times${share}", RED, ha="left")
        if index:
            arrow(axes, (x - 0.78, 0.6), (x - 1.82, 0.6), RED, dashed=True)
            note(axes, (x - 1.3, 0.25), rf"$\times${('', '2/3', '1/2')[index]}", RED)
    for row, (name, parts) in enumerate((("joint", (3, 2, 1)), ("ge", (1, 1, 1)))):
        for index, length in enumerate(parts):
            y = 3.1 - 1.75 * row - 0.33 * index
            axes.barh(y, 0.6 * length, height=0.24, left=11.2, color=BLUE if row else GREY)
            note(axes, (11.1, y), f"stage {index + 1}", ha="right", fontsize=6.5)
        note(
            axes, (11.2, 3.5 - 1.75 * row), f"{name}: sum of gradient factors", ha="left", fontweight="bold", fontsize=7
        )
    return figure


def boostnet() -> Figure:
    """The output of each exit is its own logits plus the scaled sum before it."""
    figure, axes = canvas(11.4, 5.2)
    drawn = cascade(axes, (2.4, 0.6), losses=False, gap=3.0)
    for index, (x, y) in enumerate(drawn.heads):
        arrow(axes, (x, y + 0.35), (x, y + 1.06))
        note(axes, (x + 0.12, y + 0.7), f"$z_{index + 1}$", ha="left")
        loss(axes, (x, y + 1.35), "+" if index else "", GREEN, radius=0.28)
        arrow(axes, (x, y + 1.63), (x, y + 2.2))
        loss(axes, (x, y + 2.56), f"$L_{index + 1}$")
        if index:
            arrow(axes, (x - 2.72, y + 1.35), (x - 0.28, y + 1.35), GREEN, width=1.3)
            note(axes, (x - 1.5, y + 1.72), rf"$t\,F_{index}$", GREEN)
            note(axes, (x - 1.5, y + 1.35), "//", RED, fontsize=9, fontweight="bold", over=True)
        note(axes, (x + 0.14, y + 1.92), f"$F_{index + 1}$", ha="left")
    note(axes, (9.55, 2.95), "//  gradient stopped", RED, ha="left", fontsize=6.8)
    return figure


def imta() -> Figure:
    """Two phases: the network with Gradient Equilibrium, then new classifiers on the frozen network."""
    figure, axes = canvas(17.6, 5.3)
    note(axes, (3.9, 5.0), "phase 1: the network, trained with ge", fontweight="bold")
    first = cascade(axes, (2.0, 0.6), gap=2.1)
    for x, y in first.losses:
        _down(axes, (x, y))
    note(axes, (13.1, 5.0), "phase 2: new classifiers, the network frozen", fontweight="bold")
    second = cascade(axes, (10.4, 0.6), stages=[GREY] * 3, heads=[ORANGE] * 3, gap=2.7)
    for index, (x, y) in enumerate(second.heads):
        if index:
            arrow(axes, (x - 1.95, y + 0.1), (x - 0.75, y + 0.1), GREEN, width=1.3)
    note(axes, (11.75, 2.52), "ISC", GREEN, fontweight="bold", over=True)
    box(axes, (16.75, 4.3), "old last\nclassifier", GREY, size=(1.4, 0.9))
    for x, y in second.losses[:2]:
        arrow(axes, (16.05, 4.45), (x + 0.22, y + 0.3), GREEN, bend=0.14)
    note(axes, (14.45, 4.55), "OFA", GREEN, fontweight="bold", over=True)
    arrow(axes, (16.55, 0.6), (16.75, 3.85), GREY, bend=0.12)
    return figure


def distill() -> Figure:
    """The teacher is the last exit, the next or all later ones, or the last exit of another run."""
    figure, axes = canvas(12.2, 4.7)
    drawn = cascade(axes, (2.4, 0.6))
    x, y = drawn.heads[-1]
    for left, top in drawn.losses[:2]:
        arrow(axes, (x - 0.5, y + 0.35), (left + 0.34, top - 0.1), GREEN, bend=0.1)
    middle, _ = drawn.heads[1]
    arrow(axes, (middle - 0.5, y + 0.35), (drawn.losses[0][0] + 0.24, drawn.losses[0][1] - 0.27), GREEN, dashed=True)
    note(axes, (3.65, 3.78), "softened logits", GREEN, fontsize=7)
    note(axes, (2.52, 2.58), "next, later", GREEN, fontsize=6.8, ha="left")
    box(axes, (10.9, 3.45), "another run's\nlast exit", GREY, size=(2.2, 1.0), dashed=True)
    arrow(axes, (9.8, 3.45), (drawn.losses[-1][0] + 0.36, drawn.losses[-1][1]), GREEN, dashed=True)
    note(axes, (10.9, 2.55), "if teacher is set:\nin the losses of all exits", fontsize=6.8)
    return figure


def byot() -> Figure:
    """The last exit teaches the others by its softened output and by its feature."""
    figure, axes = canvas(13.4, 5.0)
    drawn = cascade(axes, (2.4, 0.6))
    x, y = drawn.heads[-1]
    box(axes, (10.75, y), "output $z_3$ and feature $f_3$\n(held fixed)", GREEN, size=(4.2, 1.0))
    arrow(axes, (x + 0.75, y), (8.65, y), GREEN)
    for index, (left, top) in enumerate(drawn.losses[:2]):
        arrow(axes, (10.7 - 0.9 * index, y + 0.5), (left + 0.2, top + 0.32), GREEN, bend=0.3)
    note(axes, (11.2, 3.55), "$a$: softened outputs", GREEN, ha="left", fontsize=7)
    note(axes, (11.2, 3.1), r"$l$: $|A_k f_k - f_3|^2$", GREEN, ha="left", fontsize=7)
    for index, (left, _) in enumerate(drawn.heads[:2], 1):
        note(axes, (left + 0.12, y + 0.66), f"$z_{index}, f_{index}$", ha="left", fontsize=7)
    return figure


def beed() -> Figure:
    """The weighted ensemble of all exits teaches every exit."""
    figure, axes = canvas(11.6, 5.9)
    drawn = cascade(axes, (2.4, 0.6))
    box(axes, (5.0, 5.2), r"ensemble: $z_E$, $f_E \propto \sum_k b^k z_k$, $\sum_k b^k f_k$", GREEN, size=(7.4, 0.8))
    for index, (x, y) in enumerate(drawn.heads):
        arrow(axes, (x + 0.55, y + 0.35), (x + 0.55, 4.8), width=0.5 + 0.45 * index)
        arrow(axes, (x, 4.8), (x, y + 1.71), GREEN)
        note(axes, (x + 0.68, 3.45), f"$b^{index}$", ha="left")
    note(axes, (8.95, 5.2), "held fixed", GREEN, ha="left", fontsize=7)
    note(axes, (8.65, 4.3), "teaches all exits,\nthe last one as well", GREEN, ha="left", fontsize=7)
    return figure


def hdkd() -> Figure:
    """Every exit learns from all later ones; the weights of the losses descend the label losses of the other half."""
    figure, axes = canvas(16.6, 5.0)
    drawn = cascade(axes, (2.4, 0.6), gap=3.0)
    weights = {(0, 1): (3.65, 2.85), (0, 2): (4.85, 4.52), (1, 2): (6.75, 2.85)}
    for (pupil, teacher), at in weights.items():
        x, y = drawn.heads[teacher]
        left, top = drawn.losses[pupil]
        far = teacher - pupil > 1
        end = (left + 0.22, top + 0.3) if far else (left + 0.33, top - 0.15)
        arrow(axes, (x - 0.3, y + 0.35), end, GREEN, bend=0.48 if far else 0.0)
        note(axes, at, f"$r_{{{pupil + 1}{teacher + 1}}}$", GREEN, over=True)
    for index, (x, y) in enumerate(drawn.heads):
        note(axes, (x + 0.14, y + 0.62), f"$r_{index + 1}$", ha="left")
    box(axes, (13.6, 3.9), "pseudo step on half A:\n" r"$L = \sum_m r_m\, t_m$", BLUE, size=(4.4, 1.1))
    box(axes, (13.6, 1.2), "label losses of all exits\non half B", ORANGE, size=(4.4, 1.1))
    arrow(axes, (13.9, 3.35), (13.9, 1.75))
    arrow(axes, (13.1, 1.75), (13.1, 3.35), RED, dashed=True)
    note(axes, (12.95, 2.55), "updates $r$", RED, ha="right")
    return figure


def dfs() -> Figure:
    """At each boundary the exit trains one part of the channels, and the later exits train the other."""
    figure, axes = canvas(13.4, 5.0)
    note(axes, (0.45, 0.9), "$x$", fontsize=9)
    arrow(axes, (0.65, 0.9), (1.15, 0.9))
    for index in range(3):
        x = 1.9 + 5.2 * index
        box(axes, (x, 0.9), f"stage {index + 1}", BLUE)
        last = index == 2
        middle = x if last else x + 2.0
        box(axes, (middle, 3.05), f"head {index + 1}", ORANGE, size=(1.5, 0.7))
        arrow(axes, (middle, 3.4), (middle, 4.04))
        loss(axes, (middle, 4.4), f"$L_{index + 1}$")
        arrow(axes, (middle - 0.2, 1.35 if last else 1.85), (middle - 0.2, 2.7))
        arrow(axes, (middle + 0.2, 2.7), (middle + 0.2, 1.35 if last else 1.8), RED, dashed=True)
        if last:
            continue
        arrow(axes, (x + 0.75, 0.9), (middle - 0.55, 0.9))
        box(axes, (middle, 1.35), f"$S_{index + 1}$", ORANGE, size=(1.1, 0.85))
        box(axes, (middle, 0.45), f"$P_{index + 1}$", BLUE, size=(1.1, 0.85))
        arrow(axes, (middle + 0.55, 1.1), (x + 4.45, 1.1))
        arrow(axes, (x + 4.45, 0.55), (middle + 0.58, 0.55), RED, dashed=True)
    note(axes, (4.3, 2.27), "trains $S_1$", RED, ha="left", fontsize=6.8)
    note(axes, (3.5, 2.27), "reads both", ha="right", fontsize=6.8)
    note(axes, (5.4, 1.36), "reads both", fontsize=6.8)
    note(axes, (5.45, 0.27), "trains $P_1$", RED, fontsize=6.8)
    return figure


def bdl() -> Figure:
    """Each exit trains a window of stages; the last exit may train all of them."""
    figure, axes = canvas(12.6, 6.4)
    drawn = cascade(axes, (2.4, 2.85), exits=4)
    for index, (x, _) in enumerate(drawn.stages):
        y = 1.95 - 0.42 * index
        first = drawn.stages[max(0, index - 1)][0]
        arrow(axes, (x + 0.5, y), (first - 0.6, y), RED, dashed=True)
        note(axes, (x + 0.85, y), f"$L_{index + 1}$", RED)
    y = 1.95 - 0.42 * 4
    arrow(axes, (drawn.stages[-1][0] + 0.5, y), (1.8, y), RED, dashed=True, width=0.6)
    note(axes, (drawn.stages[-1][0] + 0.7, y), "$L_4$, if final", RED, ha="left")
    note(axes, (7.9, 1.95), "gradients, window = 2", RED, ha="left", fontsize=6.8)
    return figure


def mixed() -> Figure:
    """The parts that are trained in each phase."""
    figure, axes = canvas(23.2, 3.9)
    panels = (
        ("phase 1: the trunk", 1.9, [BLUE] * 3, [GREY, GREY, ORANGE]),
        ("phase 2: all exits", 9.8, [BLUE] * 3, [ORANGE] * 3),
        ("phase 3, if third is set", 17.7, [GREY] * 3, [ORANGE, ORANGE, GREY]),
    )
    for title, x, stages, heads in panels:
        drawn = cascade(axes, (x, 0.6), stages=stages, heads=heads, losses=False, gap=2.3)
        note(axes, (x + 2.3, 3.6), title, fontweight="bold")
        for colour, (at, y) in zip(heads, drawn.heads, strict=True):
            if colour == ORANGE:
                arrow(axes, (at, y + 0.95), (at, y + 0.38), RED, dashed=True)
    return figure


def separate() -> Figure:
    """The parts that are trained in each phase, in both orders."""
    figure, axes = canvas(17.4, 8.6)
    off = GREY
    panels = (
        ("classifier, phase 1", (1.9, 5.0), [BLUE] * 3, [off, off, ORANGE]),
        ("classifier, phase 2", (10.6, 5.0), [off] * 3, [ORANGE, ORANGE, off]),
        ("branch, phase 1", (1.9, 0.6), [BLUE, off, off], [ORANGE, off, off]),
        ("branch, phase 2 (and so on)", (10.6, 0.6), [off, BLUE, off], [off, ORANGE, off]),
    )
    for title, at, stages, heads in panels:
        drawn = cascade(axes, at, stages=stages, heads=heads, losses=False, gap=2.3)
        note(axes, (at[0] + 2.3, at[1] + 3.0), title, fontweight="bold")
        for index, (x, y) in enumerate(drawn.heads):
            if heads[index] == ORANGE:
                arrow(axes, (x, y + 0.95), (x, y + 0.38), RED, dashed=True)
    return figure


def heads() -> Figure:
    """The features of a fixed trunk are stored once; every epoch trains the heads on them."""
    figure, axes = canvas(12.8, 5.6)
    note(axes, (0.6, 0.7), "$x$", fontsize=9)
    for index, x in enumerate((2.2, 5.0, 7.8)):
        arrow(axes, (0.8, 0.7) if index == 0 else (x - 2.05, 0.7), (x - 0.75, 0.7))
        box(axes, (x, 0.7), f"stage {index + 1}", GREY)
        arrow(axes, (x, 1.15), (x, 1.78))
        box(axes, (x, 2.1), f"features $f_{index + 1}$", GREEN, size=(1.9, 0.64))
        arrow(axes, (x, 2.42), (x, 3.03), GREEN)
        box(axes, (x, 3.4), f"head {index + 1}", ORANGE, size=(1.5, 0.7))
        arrow(axes, (x, 3.75), (x, 4.34))
        loss(axes, (x, 4.7), f"$L_{index + 1}$")
        arrow(axes, (x + 0.25, 4.4), (x + 0.25, 3.78), RED, dashed=True)
    note(axes, (9.3, 0.7), "once: fixed trunk", ha="left")
    note(axes, (9.3, 2.1), "stored on disk", GREEN, ha="left")
    note(axes, (9.3, 3.4), "every epoch: heads", ha="left")
    return figure


def metagf() -> Figure:
    """One branch per exit, then fusion by learned weights."""
    figure, axes = canvas(15.6, 5.0)
    box(axes, (1.0, 2.4), "$W$", BLUE, size=(1.1, 0.9))
    for index, y in enumerate((4.2, 2.4, 0.6)):
        arrow(axes, (1.55, 2.4), (3.0, y), bend=0.0)
        box(axes, (4.35, y), f"pass {index + 1}:  mainly $L_{index + 1}$", ORANGE, size=(2.7, 0.8))
        arrow(axes, (5.7, y), (6.75, y))
        box(axes, (7.35, y), f"$W_{index + 1}$", BLUE, size=(1.1, 0.8))
        arrow(axes, (7.9, y), (10.0, 2.4 + 0.28 * (1 - index)), GREEN)
        note(axes, (8.95, y + (2.4 - y) * 0.45), f"$w_{index + 1}$", GREEN, over=True)
    box(axes, (11.25, 2.4), r"$\sum_e w_{p,e}\,W_e[p]$", GREEN, size=(2.5, 1.0))
    arrow(axes, (12.5, 2.4), (13.6, 2.4))
    box(axes, (14.4, 2.4), "$W'$", BLUE, size=(1.3, 0.9))
    note(
        axes, (11.25, 1.45), "pass K + 1 learns $\\eta$; for each\ntensor $p$, $w_p$ = softmax($\\eta_p$)", fontsize=6.8
    )
    note(axes, (14.4, 1.45), "the next\nepoch's start", fontsize=6.8)
    return figure


def l2w() -> Figure:
    """One half makes a pseudo step with predicted weights; the other half evaluates it."""
    figure, axes = canvas(16.4, 5.3)
    box(axes, (1.5, 4.2), "half A\nof the batch", GREY, size=(2.2, 1.0))
    box(axes, (1.5, 1.0), "half B\nof the batch", GREY, size=(2.2, 1.0))
    box(axes, (5.0, 4.2), r"losses $\ell_{ik}$", INK, size=(2.0, 0.9))
    box(axes, (8.5, 4.2), "weight\nnetwork $g$", GREEN, size=(2.0, 1.0))
    box(axes, (12.5, 4.2), r"$\hat\theta$: pseudo step on" "\n" r"$\sum w_{ik}\,\ell_{ik}$", BLUE, size=(3.3, 1.1))
    box(axes, (12.5, 1.0), "$L_{meta}$: loss of each exit on\nthe images allocated to it", ORANGE, size=(4.3, 1.1))
    arrow(axes, (2.6, 4.2), (4.0, 4.2))
    arrow(axes, (6.0, 4.2), (7.5, 4.2))
    arrow(axes, (9.5, 4.2), (10.85, 4.2), GREEN)
    note(axes, (10.15, 4.5), "$w_{ik}$", GREEN)
    arrow(axes, (12.5, 3.65), (12.5, 1.55))
    arrow(axes, (2.6, 1.0), (10.35, 1.0))
    arrow(axes, (10.6, 1.55), (8.6, 3.7), RED, dashed=True)
    note(axes, (8.15, 2.6), "updates $g$", RED)
    note(axes, (5.0, 2.35), "then the real step with the new\nweights, and the halves swap roles", fontsize=6.8)
    return figure


def adaloss() -> Figure:
    """Running means of the losses, and weights that are their inverses."""
    figure, axes = canvas(16.2, 5.6)
    drawn = cascade(axes, (2.4, 0.6))
    for index, (x, y) in enumerate(drawn.losses):
        arrow(axes, (x, y + 0.36), (x, y + 0.95), GREEN)
        box(axes, (x, y + 1.35), f"mean $m_{index + 1}$", GREEN, size=(1.6, 0.75))
        _down(axes, (x, y))
        note(axes, (x + 0.3, y - 0.62), f"$\\times\\, w_{index + 1}$", RED, ha="left")
    for row, (title, parts) in enumerate(
        (("running mean $m_k$", (1.0, 0.6, 0.4)), ("weight $w_k$", (0.4, 0.667, 1.0)))
    ):
        note(axes, (11.6, 4.9 - 2.3 * row), title, ha="left", fontweight="bold", fontsize=7)
        for index, length in enumerate(parts):
            y = 4.4 - 2.3 * row - 0.42 * index
            axes.barh(y, 3.0 * length, height=0.28, left=11.6, color=BLUE if row else GREY)
            note(axes, (11.5, y), f"exit {index + 1}", ha="right", fontsize=6.5)
    note(axes, (13.1, 0.6), "$w_k$ is proportional to $1/m_k$,\nthe largest is 1", fontsize=6.8)
    return figure


def cgt() -> Figure:
    """A gate behind each exit: what an image that is right with confidence no longer trains."""
    figure, axes = canvas(15.6, 5.0)
    drawn = cascade(axes, (2.4, 0.6), gap=3.2)
    passed = ("1", "g_1", r"g_1 \, g_2")
    for index, (x, y) in enumerate(drawn.losses):
        _down(axes, (x, y))
        note(axes, (x, y + 0.75), rf"$\times\, {passed[index]}$", GREEN, fontsize=9)
        if index < 2:
            loss(axes, (x + 1.6, y), f"$g_{index + 1}$", GREEN)
            arrow(axes, (x + 0.6, y - 1.0), (x + 1.34, y - 0.26), GREEN)
            arrow(axes, (x + 1.96, y), (x + 2.84, y), GREEN)
    note(axes, (13.1, 3.9), "hard gate:", ha="center", fontweight="bold", fontsize=7)
    note(axes, (13.1, 3.25), "0 if the label is predicted\nwith confidence, else 1", fontsize=6.8)
    note(axes, (13.1, 2.3), "soft gate:", ha="center", fontweight="bold", fontsize=7)
    note(axes, (13.1, 1.65), "falls from 1 to 0 as the label's\nprobability rises", fontsize=6.8)
    return figure


def ztw() -> Figure:
    """Two phases: the trunk with its last head, then a cascade of early heads on the frozen trunk."""
    figure, axes = canvas(17.4, 4.6)
    note(axes, (4.2, 4.25), "phase 1: the trunk and the last head", fontweight="bold")
    first = cascade(axes, (1.9, 0.6), stages=[BLUE] * 3, heads=[GREY, GREY, ORANGE], losses=False, gap=2.3)
    x, y = first.heads[-1]
    arrow(axes, (x, y + 0.35), (x, y + 0.94))
    loss(axes, (x, y + 1.3), "$L_3$")
    _down(axes, (x, y + 1.35))
    note(axes, (13.1, 4.25), "phase 2: the early heads, on the frozen trunk", fontweight="bold")
    second = cascade(axes, (10.4, 0.6), stages=[GREY] * 3, heads=[ORANGE, ORANGE, GREY], losses=False, gap=2.7)
    for index, (x, y) in enumerate(second.heads[:2]):
        arrow(axes, (x, y + 0.35), (x, y + 0.94))
        loss(axes, (x, y + 1.3), f"$L_{index + 1}$")
        arrow(axes, (x + 0.2, y + 0.92), (x + 0.2, y + 0.38), RED, dashed=True)
    (left, y), (right, _) = second.heads[:2]
    arrow(axes, (left + 0.78, y), (right - 0.78, y), GREEN, width=1.3)
    note(axes, ((left + right) / 2, y + 0.42), "logits $y_1$", GREEN, fontsize=7)
    note(axes, ((left + right) / 2, y), "//", RED, fontsize=9, fontweight="bold", over=True)
    note(axes, (15.8, 3.3), "//  gradient stopped", RED, fontsize=6.8)
    return figure


def gpf() -> Figure:
    """Exit 2 of 3: its answer comes from two states and the predicted third one."""
    figure, axes = canvas(14.2, 5.6)
    note(axes, (6.2, 5.35), "exit 2 of 3", fontweight="bold")
    for index, x in enumerate((2.4, 5.8, 9.2)):
        box(axes, (x, 0.6), f"stage {index + 1}")
        arrow(axes, (x, 1.05), (x, 1.72))
        box(axes, (x, 2.1), f"state $s_{index + 1}$", ORANGE, size=(1.6, 0.75))
        if index:
            arrow(axes, (x - 2.65, 0.6), (x - 0.75, 0.6))
    note(axes, (0.85, 0.6), "$x$", fontsize=9)
    arrow(axes, (1.05, 0.6), (1.65, 0.6))
    box(axes, (9.2, 3.7), "predicted $t_{23}$", GREEN, size=(2.2, 0.75), dashed=True)
    arrow(axes, (6.6, 2.3), (8.1, 3.45), GREEN)
    arrow(axes, (9.2, 2.48), (9.2, 3.32), GREEN, dashed=True)
    note(axes, (9.5, 2.9), r"$1 - \cos(t_{23}, s_3)$ in the loss", GREEN, ha="left", fontsize=7)
    loss(axes, (5.8, 4.5), "$y_2$", INK)
    arrow(axes, (3.0, 2.48), (5.48, 4.32))
    arrow(axes, (5.8, 2.48), (5.8, 4.14))
    arrow(axes, (8.1, 3.95), (6.16, 4.45), GREEN)
    note(axes, (9.2, 2.84), "//", RED, fontsize=9, fontweight="bold", over=True)
    note(axes, (4.2, 3.38), "//", RED, fontsize=9, fontweight="bold", over=True)
    note(axes, (2.6, 4.0), "past, times\nthe gate", fontsize=6.8)
    note(axes, (8.4, 4.75), "future, times 1 - the gate", GREEN, fontsize=6.8)
    note(axes, (11.0, 0.6), "//  gradient stopped", RED, ha="left", fontsize=6.8)
    return figure


def aggregators() -> Figure:
    """Two conflicting gradients and three directions, computed from the formulas."""
    figure, axes = canvas(16.0, 4.5)
    g1, g2 = np.array([1.9, 0.45]), np.array([-1.15, 1.35])
    h1 = g1 - (g1 @ g2) / (g2 @ g2) * g2
    h2 = g2 - (g1 @ g2) / (g1 @ g1) * g1
    share = float(np.clip((g2 @ (g2 - g1)) / ((g1 - g2) @ (g1 - g2)), 0, 1))
    panels = (
        ("joint: the sum", g1 + g2, ()),
        ("pcgrad: mean of projections", (h1 + h2) / 2, (h1, h2)),
        ("mgda: shortest combination", share * g1 + (1 - share) * g2, ()),
    )
    for panel, (title, direction, helpers) in enumerate(panels):
        origin = np.array([2.3 + 5.3 * panel, 0.75])
        note(axes, (origin[0] + 0.3, 4.15), title, fontweight="bold")
        if panel == 2:
            ends = np.stack([origin + g1, origin + g2])
            axes.plot(ends[:, 0], ends[:, 1], color=GREY, linewidth=0.8, linestyle=":")
        for name, vector in (("$g_1$", g1), ("$g_2$", g2)):
            _vector(axes, origin, vector, BLUE)
            note(axes, tuple(origin + 1.17 * vector), name, BLUE)
        for vector in helpers:
            _vector(axes, origin, vector, GREY, dashed=True)
        _vector(axes, origin, direction, RED, width=1.8)
        note(axes, tuple(origin + direction + np.array([0.1, 0.25])), "$d$", RED)
    return figure


def _vector(
    axes: Axes, origin: np.ndarray, vector: np.ndarray, colour: str, *, width: float = 1.2, dashed: bool = False
) -> None:
    arrow(axes, tuple(origin), tuple(origin + vector), colour, width=width, dashed=dashed)


def _down(axes: Axes, at: Point) -> None:
    """Draw the gradient of a loss, through its head to its stage."""
    x, y = at
    arrow(axes, (x + 0.2, y - 0.42), (x + 0.2, y - 0.98), RED, dashed=True)
    arrow(axes, (x + 0.2, y - 1.72), (x + 0.2, y - 2.38), RED, dashed=True)
