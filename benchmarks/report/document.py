"""All tables and figures of a comparison as one document: Markdown, or LaTeX that compiles as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from exitkit.benchmarks.report.comparison import Comparison
from exitkit.benchmarks.report.diagnostics import Picture
from exitkit.benchmarks.report.formats import FITTED, SPECIAL

FIGURES = {
    "anytime": "Accuracy of each exit against its cost; bands: one sd over seeds{crosses}.",
    "budgeted": "Budgeted batch: accuracy against realised mean cost, thresholds from validation{crosses}.",
    "oracle": "Budgeted curves, and dotted the bound of a rule that knows the best exit of every image.",
    "stitched": "Networks of several sizes as one curve, chosen on validation.",
    "learning": "Validation accuracy over training.",
    "sweep": "Accuracy against the values of a swept field.",
}
"""What each figure shows; `caption` completes it."""

_HEAD = r"""\documentclass{article}
\usepackage{booktabs,graphicx}
\usepackage[margin=2cm]{geometry}
\begin{document}
\sloppy
"""

_FIGURE = r"""\begin{figure*}[!htbp]
\centering
%s
\caption{%s}
\label{fig:%s}
\end{figure*}
"""


def caption(kind: str, static: pd.DataFrame) -> str:
    """Return what a figure shows; `static` are the networks of one exit that it may show, too."""
    return FIGURES[kind].format(crosses="; crosses: networks of one exit" if len(static) else "")


def _picture(kind: str) -> str:
    return FITTED % f"\\includegraphics{{{kind}.pdf}}"


def lead(comparison: Comparison) -> list[str]:
    """Return what stands before the tables: the comparison's note, what its runs share, and in what methods differ."""
    lines = [comparison.context.note] if comparison.context.note else []
    lines += [f"All runs: {'. And: '.join(dict.fromkeys(comparison.shared.values()))}."]
    lines += [f"{dataset}: {', or '.join(counts)}." for dataset, counts in comparison.images.items()]
    return lines + [f"Mind: {text}." for text in mind(comparison)]


def mind(comparison: Comparison) -> list[str]:
    """Return in what methods differ besides; what is so on all networks and data is said once."""
    where: dict[str, list[str]] = {}
    for (backbone, dataset), notes in comparison.notes.items():
        for note in notes:
            where.setdefault(note, []).append(f"{backbone} and {dataset}")
    whole = len(comparison.notes)
    return [note if len(on) == whole > 1 else f"on {', '.join(on)}, {note}" for note, on in where.items()]


def title(comparison: Comparison) -> str:
    """Return the comparison's title."""
    return comparison.context.title or "Comparison of training methods"


def markdown_document(
    comparison: Comparison, tables: Mapping[str, str], pictures: Sequence[str], seen: Sequence[Picture]
) -> str:
    """Write a report whose pictures lie beside it.

    Args:
        comparison: what it is of.
        tables: {kind: Markdown}.
        pictures: names of PNG files.
        seen: what `exitkit diagnose` drew.
    """
    parts = [f"# {title(comparison)}", *lead(comparison)]
    shown = {kind: f"![{caption(kind, comparison.static)}]({kind}.png)" for kind in pictures}
    for kind, text in tables.items():
        parts.append(f"## {kind.capitalize()}\n\n{text.strip()}")
        if kind in pictures:
            parts.append(shown[kind])
    parts += [f"## {kind.capitalize()}\n\n{shown[kind]}" for kind in pictures if kind not in tables]
    parts += ["## Diagnostics"] * bool(seen)
    parts += [f"![{picture.caption}]({picture.name}.png)\n\n*{picture.caption}*" for picture in seen]
    return "\n\n".join(parts) + "\n"


def latex_document(
    comparison: Comparison, tables: Sequence[str], pictures: Sequence[str], seen: Sequence[Picture]
) -> str:
    """Write a document that puts in the tables (.tex) and figures (.pdf) that lie beside it.

    Args:
        comparison: what it is of.
        tables: names of .tex files.
        pictures: names of .pdf files.
        seen: what `exitkit diagnose` drew.
    """
    parts = [_HEAD, f"\\section*{{{title(comparison).translate(SPECIAL)}}}\n"]
    parts += [f"{line.translate(SPECIAL)}\n\n" for line in lead(comparison)]
    for kind in tables:
        parts.append(f"\\input{{{kind}}}\n")
    captions = {kind: caption(kind, comparison.static) for kind in pictures}
    captions |= {picture.name: picture.caption for picture in seen}
    parts += [_FIGURE % (_picture(name), text.translate(SPECIAL), name) for name, text in captions.items()]
    return "".join([*parts, "\\end{document}\n"])
