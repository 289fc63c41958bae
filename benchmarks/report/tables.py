"""The wide tables as Markdown and as LaTeX (booktabs)."""

from __future__ import annotations

import re

import pandas as pd

from exitkit.benchmarks.report.collect import GROUP
from exitkit.benchmarks.report.layout import (
    TRAINING_HEADS,
    Wide,
    difference_caption,
    difference_heads,
    difference_rows,
    group_name,
    published_caption,
    published_rows,
    training_caption,
    training_rows,
)

PREAMBLE = "% needs \\usepackage{booktabs} and \\usepackage{adjustbox} (which shrinks what is too wide)\n"

TABLE = r"""\begin{table*}[t]
\centering
\caption{%s}
\label{tab:%s}
\begin{adjustbox}{max width=\textwidth}
%s\end{adjustbox}
\end{table*}
"""

SPECIAL = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "–": "--",
    }
)


def markdown(tables: list[Wide]) -> str:
    """Write the tables one after the other, each under its caption; best means bold."""
    return "\n\n".join(f"{table.caption}\n\n{_markdown_table(table)}" for table in tables) + "\n"


def _markdown_table(table: Wide) -> str:
    costs = [cost + table.unit for _, cost in table.heads]
    heads = [f"{name} ({cost})" for (name, _), cost in zip(table.heads, costs, strict=True)]
    rows = []
    for name, cells in table.cells.items():
        texts = [f"**{cell.text()}**" if cell.best else cell.text() for cell in cells]
        rows.append([name, *texts, str(table.seeds[name])])
    frame = pd.DataFrame(rows, columns=["method", *(heads if table.kind == "anytime" else costs), "n"])
    align = ("left", *["right"] * (len(heads) + 1))
    # Left to itself, tabulate reads "97.30" as a number and writes 97.3.
    return str(frame.to_markdown(index=False, colalign=align, disable_numparse=True))


def difference_markdown(differences: pd.DataFrame) -> str:
    """Write the differences to the baseline, a table for each backbone and data set."""
    texts = []
    for _, rows in differences.groupby(GROUP, sort=False):
        heads, cells = difference_heads(rows), difference_rows(rows)
        table = [[name, *(cell.text() for cell in row)] for name, row in cells.items()]
        align = ("left", *["right"] * len(heads))
        frame = pd.DataFrame(table, columns=["method", *heads])
        markdown = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
        texts.append(f"{difference_caption(rows)} ({group_name(rows)})\n\n{markdown}")
    return "\n\n".join(texts) + "\n"


def difference_latex(differences: pd.DataFrame) -> str:
    """Write the differences to the baseline, a table for each backbone and data set, ready to be \\input."""
    tables = []
    for _, rows in differences.groupby(GROUP, sort=False):
        heads, cells = difference_heads(rows), difference_rows(rows)
        table = [
            [name.translate(SPECIAL), *(cell.text(r"$\pm$").replace("–", "--") for cell in row)]
            for name, row in cells.items()
        ]
        frame = pd.DataFrame(table, columns=["method", *heads])
        tabular = frame.style.hide(axis="index").to_latex(hrules=True, column_format="l" + "r" * len(heads))
        label = re.sub(r"[^a-zA-Z0-9]+", "-", f"differences-{group_name(rows)}")
        caption = f"{difference_caption(rows)} ({group_name(rows)})".translate(SPECIAL)
        tables.append(TABLE % (caption, label, tabular))
    return PREAMBLE + "\n".join(tables)


def published_markdown(published: pd.DataFrame) -> str:
    """Write ours beside the papers' numbers, a table for each backbone and data set."""
    texts = []
    for _, rows in published.groupby(GROUP, sort=False):
        heads, table = published_rows(rows)
        align = ("left", "left", *["right"] * (len(heads) - 2))
        frame = pd.DataFrame(table, columns=heads)
        markdown = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
        texts.append(f"{published_caption(rows)} ({group_name(rows)})\n\n{markdown}")
    return "\n\n".join(texts) + "\n"


def published_latex(published: pd.DataFrame) -> str:
    """Write ours beside the papers' numbers, a table for each backbone and data set, ready to be \\input."""
    tables = []
    for _, rows in published.groupby(GROUP, sort=False):
        heads, table = published_rows(rows)
        frame = pd.DataFrame([[text.translate(SPECIAL) for text in row] for row in table], columns=heads)
        tabular = frame.style.hide(axis="index").to_latex(hrules=True, column_format="ll" + "r" * (len(heads) - 2))
        label = re.sub(r"[^a-zA-Z0-9]+", "-", f"published-{group_name(rows)}")
        tables.append(TABLE % (f"{published_caption(rows)} ({group_name(rows)})".translate(SPECIAL), label, tabular))
    return PREAMBLE + "\n".join(tables)


def training_markdown(training: pd.DataFrame) -> str:
    """Write what training cost, a table for each backbone and data set."""
    return (
        "\n\n".join(
            f"{training_caption(rows)} ({group_name(rows)})\n\n"
            + str(
                _training_frame(rows).to_markdown(index=False, disable_numparse=True, colalign=("left", *["right"] * 5))
            )
            for _, rows in training.groupby(GROUP, sort=False)
        )
        + "\n"
    )


def training_latex(training: pd.DataFrame) -> str:
    """Write what training cost, a table for each backbone and data set, ready to be \\input."""
    tables = []
    for _, rows in training.groupby(GROUP, sort=False):
        frame = _training_frame(rows).map(lambda text: text.translate(SPECIAL))
        tabular = frame.style.hide(axis="index").to_latex(hrules=True, column_format="l" + "r" * 5)
        label = re.sub(r"[^a-zA-Z0-9]+", "-", f"training-{group_name(rows)}")
        caption = f"{training_caption(rows)} ({group_name(rows)})".translate(SPECIAL)
        tables.append(TABLE % (caption, label, tabular))
    return PREAMBLE + "\n".join(tables)


def _training_frame(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(training_rows(rows), columns=["method", *TRAINING_HEADS, "n"])


def latex(tables: list[Wide]) -> str:
    """Write the tables one after the other, two columns wide, ready to be \\input; best means bold."""
    return PREAMBLE + "\n".join(_latex_table(table) for table in tables)


def _latex_table(table: Wide) -> str:
    over = "" if table.kind == "anytime" else "average budget (multiply-adds)"
    heads = [(over or name, (cost + table.unit).translate(SPECIAL)) for name, cost in table.heads]
    columns = pd.MultiIndex.from_tuples([*heads, ("", "$n$")])
    rows = {
        name: [*(cell.text(r"$\pm$") for cell in cells), str(table.seeds[name])] for name, cells in table.cells.items()
    }
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=range(len(columns)))
    frame.columns = columns
    frame.index = [name.translate(SPECIAL) for name in rows]
    bold = pd.DataFrame("", frame.index, frame.columns)
    for i, cells in enumerate(table.cells.values()):
        bold.iloc[i, :-1] = ["textbf:--rwrap;" if cell.best else "" for cell in cells]
    tabular = frame.style.apply(lambda _: bold, axis=None).to_latex(
        hrules=True, column_format="l" + "r" * len(columns), multicol_align="c"
    )
    label = re.sub(r"[^a-zA-Z0-9]+", "-", f"{table.kind}-{table.group}")
    return TABLE % (table.caption.translate(SPECIAL), label, tabular)
