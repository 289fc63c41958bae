"""The tables of a report as Markdown and as LaTeX (booktabs)."""

from __future__ import annotations

import re

import pandas as pd

from exitkit.benchmarks.report.narrow_tables import Sheet
from exitkit.benchmarks.report.wide_tables import Cell, Wide
from exitkit.escaping import in_latex, in_markdown

ENGINES = r"""% Latin letters work with every engine. Names in other scripts need xelatex or lualatex, and a font that
% has them: \usepackage{fontspec}\setmainfont{...}.
"""
PREAMBLE = "% needs \\usepackage{booktabs} and \\usepackage{graphicx} (to scale down wide tables)\n" + ENGINES

TABLE = r"""\begin{table*}[!htbp]
\centering
\setlength{\belowcaptionskip}{6pt}
\caption{%s}
\label{tab:%s}
%s
\end{table*}
"""
"""A table below its caption, at a distance from it: by default, captions of LaTeX's classes touch the rule."""

FITTED = r"""\sbox0{%%
%s}%%
\ifdim\wd0>\textwidth\sbox0{\resizebox{\textwidth}{!}{\usebox0}}\fi
\ifdim\ht0>0.8\textheight\sbox0{\resizebox{!}{0.8\textheight}{\usebox0}}\fi
\usebox0"""
"""Scales down content that is too wide or too high; needs graphicx only."""


def markdown(tables: list[Wide]) -> str:
    """Return the tables as Markdown, each below its caption; the best values are bold."""
    return "\n\n".join(f"{in_markdown(table.caption)}\n\n{_markdown_table(table)}" for table in tables) + "\n"


def _markdown_table(table: Wide) -> str:
    costs = [cost + table.unit for _, cost in table.heads]
    heads = [f"{name} ({cost})" for (name, _), cost in zip(table.heads, costs, strict=True)]
    rows = []
    for name, cells in table.cells.items():
        rows.append([in_markdown(name), *map(_strong, cells), table.count(name)])
    frame = pd.DataFrame(rows, columns=["method", *(heads if table.kind == "anytime" else costs), "n"])
    align = ("left", *["right"] * (len(heads) + 1))
    # By default, tabulate parses "97.30" as a number and writes 97.3.
    return str(frame.to_markdown(index=False, colalign=align, disable_numparse=True))


def sheets_markdown(tables: list[Sheet]) -> str:
    """Return narrow tables as Markdown, each below its caption; the best values are bold."""
    texts = []
    for sheet in tables:
        rows = [[_strong(cell) for cell in row] for row in sheet.rows]
        frame = pd.DataFrame(rows, columns=[in_markdown(head) for head in sheet.heads])
        align = ["left"] * sheet.left + ["right"] * (len(sheet.heads) - sheet.left)
        table = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
        texts.append(f"{in_markdown(f'{sheet.caption} ({sheet.group})')}\n\n{table}")
    return "\n\n".join(texts) + "\n"


def _strong(cell: Cell) -> str:
    text = in_markdown(cell.text())
    return f"**{text}**" if cell.best else text


def sheets_latex(sheets: list[Sheet]) -> str:
    """Return narrow tables as LaTeX, for \\input; the best values are bold."""
    tables = []
    for sheet in sheets:
        rows = [[_bold(cell) for cell in row] for row in sheet.rows]
        frame = pd.DataFrame(rows, columns=["$n$" if head == "n" else in_latex(head) for head in sheet.heads])
        columns = "l" * sheet.left + "r" * (len(sheet.heads) - sheet.left)
        tabular = frame.style.hide(axis="index").to_latex(hrules=True, column_format=columns)
        label = re.sub(r"[^a-zA-Z0-9]+", "-", f"{sheet.kind}-{sheet.group}")
        tables.append(TABLE % (in_latex(f"{sheet.caption} ({sheet.group})"), label, FITTED % tabular))
    return PREAMBLE + "\n".join(tables)


def _bold(cell: Cell) -> str:
    text = in_latex(cell.text())
    return rf"\textbf{{{text}}}" if cell.best else text


def latex(tables: list[Wide]) -> str:
    """Return the tables as LaTeX of two-column width, for \\input; the best values are bold."""
    return PREAMBLE + "\n".join(_latex_table(table) for table in tables)


def _latex_table(table: Wide) -> str:
    over = "" if table.kind == "anytime" else f"average budget ({table.cost})"
    heads = [(over or name, in_latex(cost + table.unit)) for name, cost in table.heads]
    columns = pd.MultiIndex.from_tuples([*heads, ("", "$n$")])
    rows = {
        name: [*(in_latex(cell.text()) for cell in cells), table.count(name)] for name, cells in table.cells.items()
    }
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=range(len(columns)))
    frame.columns = columns
    frame.index = [in_latex(name) for name in rows]
    bold = pd.DataFrame("", frame.index, frame.columns)
    for i, cells in enumerate(table.cells.values()):
        bold.iloc[i, :-1] = ["textbf:--rwrap;" if cell.best else "" for cell in cells]
    tabular = frame.style.apply(lambda _: bold, axis=None).to_latex(
        hrules=True, column_format="l" + "r" * len(columns), multicol_align="c"
    )
    label = re.sub(r"[^a-zA-Z0-9]+", "-", f"{table.kind}-{table.group}")
    return TABLE % (in_latex(table.caption), label, FITTED % tabular)
