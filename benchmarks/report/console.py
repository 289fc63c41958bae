"""The wide tables on a terminal."""

from __future__ import annotations

from math import ceil

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from exitkit.benchmarks.report.collect import GROUP, Comparison
from exitkit.benchmarks.report.layout import (
    TRAINING_HEADS,
    Cell,
    Wide,
    difference_caption,
    difference_heads,
    difference_rows,
    group_name,
    published_caption,
    published_rows,
    seed_count,
    training_caption,
    training_rows,
    wide_tables,
)

TITLES = {"anytime": "Anytime accuracy (%)", "budgeted": "Budgeted-batch accuracy (%)"}
ACROSS = {"anytime": "exit and its multiply-adds", "budgeted": "average budget in multiply-adds"}
BEST, SPREAD = "bold green", "not bold dim default"


def print_report(comparison: Comparison, console: Console) -> None:
    """Print the anytime and the budgeted table of each backbone and data set, fitted to the console's width.

    Where `97.3 ± 0.4` makes a table too wide, the sd goes below the mean; where that is still too wide, the
    columns go on in a second table.
    """
    for kind in ("anytime", "budgeted"):
        for wide in wide_tables(comparison, kind):
            seeds = seed_count(wide.seeds.values())
            console.print(Text.assemble("\n ", (TITLES[kind], "bold"), f"  {wide.group}, {seeds}"))
            for table in _fitted(wide, console):
                console.print(table)
            spread = "mean ± sd; " if max(wide.seeds.values()) > 1 else ""
            unit = f" ({wide.unit.strip()})" if wide.unit else ""
            console.print(Text(f" {spread}columns: {ACROSS[kind]}{unit}; best in bold", style="dim"))
    for _, rows in comparison.differences.groupby(GROUP, sort=False):
        console.print(Text.assemble("\n ", ("Differences", "bold"), f"  {group_name(rows)}"))
        console.print(_differences(rows))
        console.print(Text(f" {difference_caption(rows)}", style="dim"))
    for _, rows in comparison.published.groupby(GROUP, sort=False):
        console.print(Text.assemble("\n ", ("Published", "bold"), f"  {group_name(rows)}"))
        heads, lines = published_rows(rows)
        table = Table(box=box.SIMPLE_HEAVY, padding=(0, 1, 0, 0), header_style="bold cyan")
        for place, head in enumerate(heads):
            table.add_column(head, justify="left" if place < 2 else "right")
        for line in lines:
            table.add_row(*line)
        console.print(table)
        console.print(Text(f" {published_caption(rows)}", style="dim"))
    for _, rows in comparison.training.groupby(GROUP, sort=False):
        console.print(Text.assemble("\n ", ("Training", "bold"), f"  {group_name(rows)}"))
        table = Table(box=box.SIMPLE_HEAVY, padding=(0, 1, 0, 0), header_style="bold cyan")
        table.add_column("method", no_wrap=True)
        for head in (*TRAINING_HEADS, "n"):
            table.add_column(head, justify="right")
        for row in training_rows(rows):
            table.add_row(*row)
        console.print(table)
        console.print(Text(f" {training_caption(rows).lower()}", style="dim"))


def _differences(rows: pd.DataFrame) -> Table:
    table = Table(box=box.SIMPLE_HEAVY, padding=(0, 1, 0, 0), header_style="bold cyan")
    table.add_column("method", no_wrap=True)
    for head in difference_heads(rows):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("n", justify="right", style="dim", no_wrap=True)
    seeds = rows.groupby("method", sort=False)["n"].max()
    for name, cells in difference_rows(rows).items():
        table.add_row(Text(name), *(_cell(cell, stacked=True) for cell in cells), str(seeds[name]))
    return table


def _fitted(wide: Wide, console: Console) -> list[Table]:
    """Return the most generous layout that fits, as one table or several."""
    unlimited = console.options.update(width=10_000)
    columns = len(wide.heads)
    for parts, stacked in [(1, False), *((parts, True) for parts in range(1, columns + 1))]:
        step = ceil(columns / parts)
        tables = [_table(wide, range(i, min(i + step, columns)), stacked) for i in range(0, columns, step)]
        if all(console.measure(table, options=unlimited).maximum <= console.width for table in tables):
            break
    return tables


def _table(wide: Wide, columns: range, stacked: bool) -> Table:
    """Lay out some columns; `stacked` puts each sd below its mean, and leaves the unit to the caption."""
    table = Table(box=box.SIMPLE_HEAVY, padding=(0, 1, 0, 0), header_style="bold cyan", leading=int(stacked))
    table.add_column("method", no_wrap=True)
    for name, cost in (wide.heads[i] for i in columns):
        amount = cost if stacked else cost + wide.unit
        head = f"{name}\n{amount}" if wide.kind == "anytime" else amount
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("n", justify="right", style="dim", no_wrap=True)
    for name, cells in wide.cells.items():
        table.add_row(Text(name), *(_cell(cells[i], stacked) for i in columns), str(wide.seeds[name]))
    return table


def _cell(cell: Cell, stacked: bool) -> Text:
    text = Text(cell.mean, style=BEST if cell.best else "")
    if cell.sd:
        text.append(f"\n±{cell.sd}" if stacked else f" ± {cell.sd}", style=SPREAD)
    return text
