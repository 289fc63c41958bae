"""Draws all diagrams of the documentation: `python docs/figures/draw.py [FOLDER]`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import backbone_diagrams as backbones
import matplotlib
import method_diagrams as methods
from grammar import STYLE, save
from matplotlib.figure import Figure
from overview import overview

FIGURES: dict[str, Callable[[], Figure]] = {
    "overview": overview,
    **{f"method-{draw.__name__}": draw for draw in (
        methods.joint, methods.separate, methods.heads, methods.mixed, methods.ge, methods.dfs, methods.bdl,
        methods.boostnet, methods.imta, methods.distill,
        methods.byot, methods.beed, methods.hdkd, methods.metagf,
        methods.l2w, methods.cgt, methods.adaloss, methods.ztw, methods.gpf, methods.aggregators)},
    **{f"backbone-{draw.__name__}": draw for draw in (
        backbones.msdnet, backbones.ranet, backbones.sdn, backbones.attach)},
}  # fmt: skip


def main(folder: Path) -> None:
    """Draw all of them into a folder."""
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            save(draw(), folder / f"{name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
