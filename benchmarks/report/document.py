"""All tables and figures of a comparison as one Markdown or LaTeX document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from exitkit.benchmarks.report.comparison import GROUP, Comparison
from exitkit.benchmarks.report.diagnostics import Picture
from exitkit.benchmarks.report.formats import ENGINES, FITTED
from exitkit.benchmarks.report.narrow_tables import TITLES
from exitkit.benchmarks.report.wide_tables import group_name
from exitkit.escaping import code_in_markdown, in_latex, in_markdown

FIGURES = {
    "anytime": "Accuracy of each exit against its cost; bands: one sd over seeds{crosses}.",
    "budgeted": "Budgeted batch: accuracy against realised mean cost, thresholds from validation{crosses}.",
    "oracle": "Budgeted curves; dotted: upper bound of an oracle that selects the best exit of each image.",
    "differences": (
        "Differences to the baseline with 95 % intervals (none for one seed); filled: significant after Holm's "
        "correction."
    ),
    "stitched": "Networks of several sizes combined into one curve; operating points selected on validation.",
    "policies": "Exit policies on the outputs of each method: accuracy against realised mean cost.",
    "policy_differences": (
        "Differences of exit policies to plain confidence, averaged over the budgets at which the policy has an "
        "operating point, with 95 % intervals (none for one seed); filled: significant after Holm's correction."
    ),
    "learning": "Validation accuracy during training.",
    "sweep": "Accuracy for each value of a swept field.",
}
"""{name of figure: template of its caption, see `caption`}."""

_SECTIONS = {"policy_differences": "policies"}
"""{figure: table that it follows}, if that has another name."""

_HEAD = (
    ENGINES
    + r"""\documentclass{article}
\usepackage{booktabs,graphicx}
\usepackage[margin=2cm]{geometry}
\begin{document}
\sloppy
"""
)

_FIGURE = r"""\begin{figure*}[!htbp]
\centering
%s
\caption{%s}
\label{fig:%s}
\end{figure*}
"""


_MADE = "How this report was made"


def caption(kind: str, static: pd.DataFrame) -> str:
    """Return the caption of a figure; `static` is the table of static networks, which may be empty."""
    return FIGURES[kind].format(crosses="; crosses: static networks" if len(static) else "")


def _picture(kind: str) -> str:
    return FITTED % f"\\includegraphics{{{kind}.pdf}}"


def lead(comparison: Comparison) -> list[str]:
    """Return the introduction: the note, the shared settings, the data, and the differences between methods."""
    lines = [comparison.context.note] if comparison.context.note else []
    lines += [f"Shared settings: {text}." for text in dict.fromkeys(comparison.shared.values())]
    lines += [f"{dataset}: {', or '.join(counts)}." for dataset, counts in comparison.images.items()]
    return lines + [f"Note: {text}." for text in mind(comparison)]


def mind(comparison: Comparison) -> list[str]:
    """Return what a reader has to mind: settings in which the methods differ, and exits that learned nothing.

    A difference on all networks and data sets is listed once.
    """
    where: dict[str, list[str]] = {}
    for (backbone, dataset), notes in comparison.notes.items():
        for note in notes:
            where.setdefault(note, []).append(f"{backbone} and {dataset}")
    total = len(comparison.notes)
    notes = [note if len(on) == total > 1 else f"on {', '.join(on)}, {note}" for note, on in where.items()]
    return notes + _unlearned(comparison)


def _unlearned(comparison: Comparison) -> list[str]:
    """Return a text per network and data set with exits that learned nothing."""
    rows = comparison.balanced[comparison.balanced["learned"] < 1]
    texts = []
    for _, group in rows.groupby(GROUP, sort=False):
        exits = {str(name): some["exit"].tolist() for name, some in group.groupby("method", sort=False)}
        listed = "; ".join(f"{name}, exit {', '.join(map(str, numbers))}" for name, numbers in exits.items())
        where = f"{group_name(group)}: no better than chance (balanced accuracy, in all or some seeds)"
        texts.append(f"{where}: {listed}")
    return texts


def title(comparison: Comparison) -> str:
    """Return the comparison's title."""
    return comparison.context.title or "Comparison of training methods"


def markdown_document(
    comparison: Comparison,
    tables: Mapping[str, str],
    pictures: Sequence[str],
    diagnosed: Sequence[Picture],
    made_by: Sequence[tuple[str, str]] = (),
) -> str:
    """Return a Markdown report that links to figures in the same folder.

    Args:
        comparison: the comparison.
        tables: {kind: table as Markdown}.
        pictures: names of the figures (.png), without suffix.
        diagnosed: figures of `exitkit diagnose`.
        made_by: the facts of `provenance`.
    """
    parts = [f"# {in_markdown(title(comparison))}", *map(in_markdown, lead(comparison))]
    shown = {kind: f"![{in_markdown(caption(kind, comparison.static))}]({kind}.png)" for kind in pictures}
    for kind, text in tables.items():
        parts.append(f"## {TITLES[kind]}\n\n{text.strip()}")
        parts += [shown.pop(name) for name in pictures if _SECTIONS.get(name, name) == kind]
    parts += [f"## {kind.capitalize()}\n\n{picture}" for kind, picture in shown.items()]
    parts += ["## Diagnostics"] * bool(diagnosed)
    captions = [in_markdown(picture.caption) for picture in diagnosed]
    parts += [f"![{t}]({picture.name}.png)\n\n*{t}*" for picture, t in zip(diagnosed, captions, strict=True)]
    facts = "\n".join(
        f"- {name}: {(code_in_markdown if name.startswith('command') else in_markdown)(text)}" for name, text in made_by
    )
    parts += [f"## {_MADE}\n\n{facts}"] if facts else []
    return "\n\n".join(parts) + "\n"


def latex_document(
    comparison: Comparison,
    tables: Sequence[str],
    pictures: Sequence[str],
    diagnosed: Sequence[Picture],
    made_by: Sequence[tuple[str, str]] = (),
) -> str:
    """Return a LaTeX document that includes the tables (.tex) and figures (.pdf) in the same folder.

    Args:
        comparison: the comparison.
        tables: names of the tables (.tex), without suffix.
        pictures: names of the figures (.pdf), without suffix.
        diagnosed: figures of `exitkit diagnose`.
        made_by: the facts of `provenance`.
    """
    parts = [_HEAD, f"\\section*{{{in_latex(title(comparison))}}}\n"]
    parts += [f"{in_latex(line)}\n\n" for line in lead(comparison)]
    for kind in tables:
        parts.append(f"\\input{{{kind}}}\n")
    captions = {kind: caption(kind, comparison.static) for kind in pictures}
    captions |= {picture.name: picture.caption for picture in diagnosed}
    parts += [_FIGURE % (_picture(name), in_latex(text), name) for name, text in captions.items()]
    facts = "".join(f"\\item {name}: {in_latex(text)}\n" for name, text in made_by)
    parts += [f"\\section*{{{_MADE}}}\n\\begin{{itemize}}\n{facts}\\end{{itemize}}\n"] if facts else []
    return "".join([*parts, "\\end{document}\n"])
