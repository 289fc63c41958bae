"""The tables of a report on a terminal."""

from __future__ import annotations

from math import ceil

from rich import box
from rich.table import Table
from rich.text import Text

from exitkit.benchmarks.report.comparison import Comparison
from exitkit.benchmarks.report.document import mind
from exitkit.benchmarks.report.narrow_tables import TITLES, Sheet, sheets
from exitkit.benchmarks.report.wide_tables import Cell, Wide, seed_count, wide_tables
from exitkit.cli.terminal import Console

COLUMNS = {"anytime": "exit and", "budgeted": "average budget in"}
PRINTED = (
    *("balanced", "recall", "verdicts", "spent", "differences", "policies", "targets"),
    *("static", "published", "risk", "training", "missing"),
)
BEST, SPREAD = "bold green", "not bold dim default"


def print_report(comparison: Comparison, console: Console) -> None:
    """Print the tables of each backbone and data set, fitted to the console's width.

    If a table with cells like `97.3 ± 0.4` is too wide, the sd is printed below the mean; if it is still too wide, its
    columns are divided over several tables.
    """
    for kind in ("anytime", "budgeted"):
        for wide in wide_tables(comparison, kind):
            seeds = seed_count(wide.seeds.values())
            console.print(Text.assemble("\n ", (f"{TITLES[kind]} (%)", "bold"), f"  {wide.group}, {seeds}"))
            for table in _fitted(wide, console):
                console.print(table)
            spread = "mean ± sd; " if max(wide.seeds.values()) > 1 else ""
            unit = f" ({wide.unit.strip()})" if wide.unit else ""
            console.print(Text(f" {spread}columns: {COLUMNS[kind]} {wide.cost}{unit}; best in bold", style="dim"))
    for sheet in sheets(comparison):
        if sheet.kind in PRINTED:
            console.print(Text.assemble("\n ", (sheet.title, "bold"), f"  {sheet.group}"))
            for table in _parts(sheet, console):
                console.print(table)
            console.print(Text(f" {sheet.caption}", style="dim"))
    for text in mind(comparison):
        console.print(Text(f"\n note: {text}", style="yellow"))


def _parts(sheet: Sheet, console: Console) -> list[Table]:
    """Return a narrow table, divided into several if the console is too narrow."""
    unlimited = console.options.update(width=10_000)
    numbers = range(sheet.left, len(sheet.heads))
    for parts in range(1, len(numbers) + 1):
        step = ceil(len(numbers) / parts)
        tables = [_sheet(sheet, numbers[start : start + step]) for start in range(0, len(numbers), step)]
        if all(console.measure(table, options=unlimited).maximum <= console.width for table in tables):
            return tables
    return [_sheet(sheet, numbers, fold=True)]


def _sheet(sheet: Sheet, columns: range, fold: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAVY, padding=(0, 1, 0, 0), header_style="bold cyan")
    for index in (*range(sheet.left), *columns):
        head = sheet.heads[index]
        is_text = index < sheet.left
        table.add_column(
            Text(head), justify="left" if is_text else "right", style="dim" if head == "n" else "", no_wrap=not fold
        )
    for row in sheet.rows:
        table.add_row(*(_cell(row[index], stacked=True) for index in (*range(sheet.left), *columns)))
    return table


def _fitted(wide: Wide, console: Console) -> list[Table]:
    """Return the widest layout that fits, as one or several tables."""
    unlimited = console.options.update(width=10_000)
    columns = len(wide.heads)
    for parts, stacked in [(1, False), *((parts, True) for parts in range(1, columns + 1))]:
        step = ceil(columns / parts)
        tables = [_table(wide, range(i, min(i + step, columns)), stacked) for i in range(0, columns, step)]
        if all(console.measure(table, options=unlimited).maximum <= console.width for table in tables):
            break
    return tables


def _table(wide: Wide, columns: range, stacked: bool) -> Table:
    """Lay out some columns; `stacked` prints each sd below its mean, and omits the unit, which the caption has."""
    table = Table(box=box.SIMPLE_HEAVY, padding=(0, 1, 0, 0), header_style="bold cyan", leading=int(stacked))
    table.add_column("method", no_wrap=True)
    for name, cost in (wide.heads[i] for i in columns):
        amount = cost if stacked else cost + wide.unit
        head = f"{name}\n{amount}" if wide.kind == "anytime" else amount
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("n", justify="right", style="dim", no_wrap=True)
    for name, cells in wide.cells.items():
        table.add_row(Text(name), *(_cell(cells[i], stacked) for i in columns), wide.count(name))
    return table


def _cell(cell: Cell, stacked: bool) -> Text:
    text = Text(cell.mean, style=BEST if cell.best else "")
    if cell.sd:
        text.append(f"\n±{cell.sd}" if stacked else f" ± {cell.sd}", style=SPREAD)
    return text
