"""`exitkit report`: the tables and figures of runs that are there, without training anything."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Print tables of finished runs, and write them.")
@click.argument("folder", metavar="FOLDER", default="runs")
@click.option("--out", metavar="DIR", help="Where to write tables and figures.  [default: FOLDER/report]")
def report(folder: str, out: str | None) -> None:
    """Make the tables and curves of all finished runs in FOLDER.

    \b
    Examples:
      exitkit report
      exitkit report study --out paper/tables
    """
    from rich.console import Console

    from exitkit.benchmarks.compare import BASELINE
    from exitkit.benchmarks.report import collect, print_report, write_report
    from exitkit.runs import find_runs

    comparison = collect(sorted(find_runs(folder), key=lambda run: run.label != BASELINE))
    target = Path(out) if out else Path(folder) / "report"
    write_report(comparison, target)
    print_report(comparison, Console())
    click.echo(f"tables and figures: {target}")
