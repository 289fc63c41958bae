"""The figures of `exitkit diagnose` in a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from exitkit.benchmarks.report.labels import Names
from exitkit.runs.folder import DIAGNOSTICS

if TYPE_CHECKING:
    from exitkit.runs.folder import RunFolder

CAPTIONS = {
    "conflict": "cosine of the exits' gradients: per stage during training, and per pair of exits at the last probe",
    "magnitude": "norm of the gradient of each stage, and its variance over batches",
    "validity": "fraction of valid images of each exit, and its loss",
    "weights": "weight of each image at each exit against its loss at that exit",
    "ranks": "rank correlation of the exits' confidences",
    "pruning": "accuracy that each exit loses when the parameters most important to one exit are set to zero",
}
"""{name of figure: caption}."""


class Picture(NamedTuple):
    """A figure: its name in the report, its path without suffix, and its caption."""

    name: str
    source: Path
    caption: str


def diagnostics(runs: Iterable[RunFolder], names: Mapping[str, Names]) -> list[Picture]:
    """Return the diagnostic figures in the folders of the runs.

    Args:
        runs: finished runs.
        names: {name of a run's folder: its labels}.
    """
    pictures = []
    for run in runs:
        folder = run.path / DIAGNOSTICS
        if not folder.is_dir():
            continue
        method, backbone, dataset = names[run.path.name]
        title = f"{method} on {backbone}, {dataset}, seed {run.recipe.seed}"
        for kind, caption in CAPTIONS.items():
            if all((folder / f"{kind}.{suffix}").is_file() for suffix in ("png", "pdf")):
                pictures.append(Picture(f"{kind}-{run.path.name}", folder / kind, f"{title}: {caption}."))
    return pictures
