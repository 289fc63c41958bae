"""Writes a comparison to files: CSV, Markdown, LaTeX, HTML, PNG and PDF."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from exitkit.benchmarks.report import drawing, figures
from exitkit.benchmarks.report.comparison import Comparison
from exitkit.benchmarks.report.diagnostics import diagnostics
from exitkit.benchmarks.report.document import latex_document, markdown_document
from exitkit.benchmarks.report.formats import latex, markdown, sheets_latex, sheets_markdown
from exitkit.benchmarks.report.html import html_report
from exitkit.benchmarks.report.learning import learning_curves, sweeps
from exitkit.benchmarks.report.narrow_tables import sheets
from exitkit.benchmarks.report.provenance import provenance
from exitkit.benchmarks.report.wide_tables import wide_tables
from exitkit.escaping import in_csv
from exitkit.files import write_files

FORMATS = ("csv", "md", "latex", "html", "pdf", "png")
Writer = Callable[[Path], object]


def write_report(
    comparison: Comparison,
    folder: str | Path,
    *,
    runs: Sequence[Any] = (),
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Write the tables and figures of a comparison to `folder`, which is created if missing, and return their paths.

    csv: the tables of `Comparison` that are not empty, and the tables learning (curves of every exit) and sweep. md and
    latex: formatted tables, one file per kind, and the complete report, `report.md` and `report.tex`. html: the
    complete report as one self-contained page, `report.html`. pdf and png: the figures. Files are written atomically,
    and existing files are replaced.

    Args:
        comparison: the comparison.
        folder: output folder.
        runs: runs whose learning curves and diagnostic figures are included.
        formats: some of `FORMATS`.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    learning = learning_curves(runs, comparison.names)
    swept = sweeps(comparison.anytime, runs, comparison.names)
    drawn = _figures(comparison, learning, swept)
    diagnosed = diagnostics(runs, comparison.names)
    made_by = provenance(comparison, runs)
    writers: dict[str, Writer] = {}
    if "csv" in formats:
        frames = comparison.frames() | {"learning": learning, "sweep": swept}
        writers |= {
            f"{n}.csv": partial(in_csv(f).to_csv, index=False) for n, f in frames.items() if len(f) or n in ALWAYS
        }
    narrow: dict[str, list[Any]] = {}
    for sheet in sheets(comparison):
        narrow.setdefault(sheet.kind, []).append(sheet)
    wide = {kind: wide_tables(comparison, kind) for kind in ("anytime", "budgeted")}
    if "md" in formats:
        texts = {kind: markdown(tables) for kind, tables in wide.items()}
        texts |= {kind: sheets_markdown(tables) for kind, tables in narrow.items()}
        pictures = list(drawn) if "png" in formats else []
        texts["report"] = markdown_document(comparison, texts, pictures, diagnosed if "png" in formats else [], made_by)
        writers |= {f"{name}.md": partial(_write_text, text) for name, text in texts.items()}
    if "latex" in formats:
        texts = {kind: latex(tables) for kind, tables in wide.items()}
        texts |= {kind: sheets_latex(tables) for kind, tables in narrow.items()}
        pictures = list(drawn) if "pdf" in formats else []
        texts["report"] = latex_document(
            comparison, list(texts), pictures, diagnosed if "pdf" in formats else [], made_by
        )
        writers |= {f"{name}.tex": partial(_write_text, text) for name, text in texts.items()}
    if "html" in formats:
        writers["report.html"] = partial(_write_text, html_report(comparison, learning, swept, diagnosed, made_by))
    for kind in ("png", "pdf"):
        if kind in formats:
            for name, figure in drawn.items():
                writers[f"{name}.{kind}"] = partial(drawing.save_figure, figure, kind=kind)
            for picture in diagnosed:
                writers[f"{picture.name}.{kind}"] = partial(shutil.copyfile, picture.source.with_suffix(f".{kind}"))
    write_files(folder, writers)
    return [folder / name for name in writers]


ALWAYS = ("anytime", "budgeted", "curve", "differences", "training")
"""Tables that are written even if they are empty."""


def _figures(comparison: Comparison, learning: pd.DataFrame, swept: pd.DataFrame) -> dict[str, drawing.Figure]:
    drawn = {
        "anytime": figures.anytime_figure(comparison),
        "budgeted": figures.budgeted_figure(comparison),
        "oracle": figures.oracle_figure(comparison),
    }
    if len(comparison.differences):
        drawn["differences"] = figures.differences_figure(comparison.differences)
    if len(comparison.stitched):
        drawn["stitched"] = figures.stitched_figure(comparison)
    if len(comparison.policy_curve):
        drawn["policies"] = figures.policies_figure(comparison)
    if len(comparison.policy_differences):
        drawn["policy_differences"] = figures.policy_differences_figure(comparison.policy_differences)
    if len(learning):
        drawn["learning"] = figures.learning_figure(learning)
    if len(swept):
        drawn["sweep"] = figures.sweep_figure(swept)
    return drawn


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
