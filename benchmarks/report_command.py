"""`exitkit report`: the tables and figures of runs that are there, without training anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exitkit.errors import UserError, unknown

FORMATS = ("csv", "md", "latex", "html", "pdf", "png")


@click.command(short_help="Print tables of finished runs, and write them.")
@click.argument("folder", metavar="FOLDER", default="runs")
@click.option("--out", metavar="DIR", help="Where to write tables and figures.  [default: FOLDER/report]")
@click.option("--format", "formats", metavar="A,B,...", help=f"Of {', '.join(FORMATS)}.  [default: all]")
@click.option("--baseline", metavar="NAME", help="What differences are taken to.  [default: joint, or the first]")
@click.option("--cost", metavar="NAME", help="macs, papers (their count) or latency (ms).  [default: macs]")
@click.option("--points", metavar="P", help="Operating points: shares q = p / 20 for p = 1..P.  [default: 39]")
@click.option("--rule", metavar="NAME", help="confidence, margin, entropy or patience.  [default: confidence]")
@click.option("--calibrated", is_flag=True, default=None, help="Calibrate each exit on validation first.")
@click.option("--hold", is_flag=True, default=None, help="Stay at the point before where one brings nothing.")
@click.option("--budgets", metavar="A,B,...", help="Average budgets, such as 40M,60M or 1.5ms.  [default: nine]")
@click.option("--risk", metavar="POINTS", help="Accuracy that may be lost, for risk control.  [default: 1]")
@click.option("--certainty", metavar="SHARE", help="How sure that has to be.  [default: 0.95]")
def report(folder: str, out: str | None, formats: str | None, **given: Any) -> None:
    """Make the tables and curves of all finished runs in FOLDER.

    \b
    Examples:
      exitkit report
      exitkit report study --out paper/tables --format latex,pdf
      exitkit report study --budgets 10M,20M --rule margin --calibrated
    """
    from rich.console import Console

    from exitkit.benchmarks.record import read_plan
    from exitkit.benchmarks.report import ReportOptions, collect, print_report, write_report
    from exitkit.runs import find_runs

    wanted = split_formats(formats)
    context, options, order = read_plan(Path(folder))
    asked = {key: value for key, value in given.items() if value is not None}
    chosen = ReportOptions.make(options | asked)
    place = {name: number for number, name in enumerate(order)}
    runs = sorted(find_runs(folder), key=lambda run: (place.get(run.path.name, len(place)), run.path.name))
    if not order:
        runs.sort(key=lambda run: run.recipe.method != (chosen.baseline or "joint"))
    comparison = collect(runs, options=chosen, context=context)
    target = Path(out) if out else Path(folder) / "report"
    write_report(comparison, target, runs=runs, formats=wanted)
    print_report(comparison, Console())
    click.echo(f"tables and figures: {target}")


def split_formats(formats: str | None) -> tuple[str, ...]:
    """Read a list of formats.

    Raises:
        UserError: an unknown one, or none.
    """
    if formats is None:
        return FORMATS
    names = tuple(name.strip() for name in formats.split(",") if name.strip())
    if not names:
        raise UserError(f"--format is empty; expected some of {', '.join(FORMATS)}")
    for name in names:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    return names
