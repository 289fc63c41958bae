"""A comparison as files: CSV, Markdown, LaTeX, PNG and PDF."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from exitkit.benchmarks.report.collect import Comparison
from exitkit.benchmarks.report.figures import anytime_figure, budgeted_figure, save_figure
from exitkit.benchmarks.report.layout import wide_tables
from exitkit.benchmarks.report.tables import (
    difference_latex,
    difference_markdown,
    latex,
    markdown,
    published_latex,
    published_markdown,
    training_latex,
    training_markdown,
)
from exitkit.files import make_folder, written_whole


def write_report(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write the tables and figures of a comparison into `folder` (made if missing) and return their paths.

    These are anytime and budgeted, each as .csv (raw numbers), .md and .tex (wide tables), .png and .pdf; curve.csv;
    and differences (to the baseline) and training (what it cost), as .csv, .md and .tex. Each file appears whole or
    not at all, and replaces an earlier one. Where papers have numbers for what was run, published (.csv, .md, .tex)
    sets both side by side.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    frames = {"anytime": comparison.anytime, "budgeted": comparison.budgeted, "curve": comparison.curve}
    frames |= {"differences": comparison.differences, "training": comparison.training}
    writers: dict[str, Callable[[Path], object]] = {
        f"{name}.csv": partial(frame.to_csv, index=False) for name, frame in frames.items()
    }
    for kind, figure in [("anytime", anytime_figure(comparison)), ("budgeted", budgeted_figure(comparison))]:
        tables = wide_tables(comparison, kind)
        writers[f"{kind}.md"] = partial(_write_text, markdown(tables))
        writers[f"{kind}.tex"] = partial(_write_text, latex(tables))
        for suffix in ("png", "pdf"):
            writers[f"{kind}.{suffix}"] = partial(save_figure, figure, kind=suffix)
    writers["differences.md"] = partial(_write_text, difference_markdown(comparison.differences))
    writers["differences.tex"] = partial(_write_text, difference_latex(comparison.differences))
    if len(comparison.published):
        writers["published.csv"] = partial(comparison.published.to_csv, index=False)
        writers["published.md"] = partial(_write_text, published_markdown(comparison.published))
        writers["published.tex"] = partial(_write_text, published_latex(comparison.published))
    writers["training.md"] = partial(_write_text, training_markdown(comparison.training))
    writers["training.tex"] = partial(_write_text, training_latex(comparison.training))
    make_folder(folder)
    for name, write in writers.items():
        with written_whole(folder / name) as temporary:
            write(temporary)
    return [folder / name for name in writers]


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
