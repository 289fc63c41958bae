"""What `exitkit diagnose` drew of the runs, as part of their report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from exitkit.benchmarks.report.labels import Names
from exitkit.runs.folder import DIAGNOSTICS

if TYPE_CHECKING:
    from exitkit.runs.folder import RunFolder

CAPTIONS = {
    "conflict": "how far the exits' gradients agree, by stage over training and exit by exit at the end",
    "magnitude": "the length of each stage's gradient, and its variance over batches",
    "validity": "the share of images that still teach each exit something, and its loss",
    "weights": "what each image counts at each exit against its loss there",
    "ranks": "how consistently the exits rank the images by confidence",
    "pruning": "what each exit loses when the parameters that matter most to one exit are gone",
}
"""What each figure shows."""


class Picture(NamedTuple):
    """One figure: what it is called in the report, where it lies (without its suffix), whose and what it is."""

    name: str
    source: Path
    caption: str


def diagnostics(runs: Iterable[RunFolder], names: Mapping[str, Names]) -> list[Picture]:
    """Return the figures that lie in the folders of some runs.

    Args:
        runs: the runs.
        names: what each is called, by its folder's name.
    """
    found = []
    for run in runs:
        folder = run.path / DIAGNOSTICS
        if not folder.is_dir():
            continue
        method, backbone, dataset = names[run.path.name]
        whose = f"{method} on {backbone}, {dataset}, seed {run.recipe.seed}"
        for kind, what in CAPTIONS.items():
            if all((folder / f"{kind}.{suffix}").is_file() for suffix in ("png", "pdf")):
                found.append(Picture(f"{kind}-{run.path.name}", folder / kind, f"{whose}: {what}."))
    return found
