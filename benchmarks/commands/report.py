"""`exitkit report`: the tables and figures of runs that are there, without training anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import folders, names, one_of
from exitkit.cli.options import json_option, some_of
from exitkit.errors import unknown

if TYPE_CHECKING:
    from exitkit.benchmarks.report import Comparison

FORMATS = ("csv", "md", "latex", "html", "pdf", "png")


@click.command(short_help="Print tables of finished runs, and write them.")
@click.argument("folder", metavar="FOLDER", default="runs", shell_complete=folders)
@click.option(
    "--out", metavar="DIR", shell_complete=folders, help="Where to write tables and figures.  [default: FOLDER/report]"
)
@click.option(
    "--format",
    "formats",
    metavar="A,B,...",
    shell_complete=one_of(*FORMATS),
    help=f"Of {', '.join(FORMATS)}.  [default: all]",
)
@click.option(
    "--baseline",
    metavar="NAME",
    shell_complete=names("methods"),
    help="What differences are taken to.  [default: joint, or the first]",
)
@click.option(
    "--cost",
    metavar="NAME",
    shell_complete=one_of("macs", "papers", "latency"),
    help="macs, papers (their count) or latency (ms).  [default: macs]",
)
@click.option("--points", metavar="P", help="Operating points: shares q = p / 20 for p = 1..P.  [default: 39]")
@click.option(
    "--rule",
    metavar="NAME",
    shell_complete=one_of("confidence", "margin", "entropy", "patience"),
    help="confidence, margin, entropy or patience.  [default: confidence]",
)
@click.option("--calibrated", is_flag=True, default=None, help="Calibrate each exit on validation first.")
@click.option("--hold", is_flag=True, default=None, help="Stay at the point before where one brings nothing.")
@click.option("--budgets", metavar="A,B,...", help="Average budgets, such as 40M,60M or 1.5ms.  [default: nine]")
@click.option("--risk", metavar="POINTS", help="Accuracy that may be lost, for risk control.  [default: 1]")
@click.option("--certainty", metavar="SHARE", help="How sure that has to be.  [default: 0.95]")
@json_option("all tables, as arrays of rows, and the files that were written")
def report(folder: str, out: str | None, formats: str | None, as_json: bool, **given: Any) -> None:
    """Make the tables and curves of all finished runs in FOLDER.

    \b
    Examples:
      exitkit report
      exitkit report study --out paper/tables --format latex,pdf
      exitkit report study --budgets 10M,20M --rule margin --calibrated
      exitkit report study --json
    """
    from rich.console import Console

    from exitkit.benchmarks.campaign.record import read_plan
    from exitkit.benchmarks.report import ReportOptions, collect, print_report, write_report
    from exitkit.cli.progress import working
    from exitkit.inference.budgets import exit_costs
    from exitkit.runs.table import find_runs

    wanted = split_formats(formats)
    context, options, order = read_plan(Path(folder))
    asked = {key: value for key, value in given.items() if value is not None}
    chosen = ReportOptions.make(options | asked)
    place = {name: number for number, name in enumerate(order)}
    runs = sorted(find_runs(folder), key=lambda run: (place.get(run.path.name, len(place)), run.path.name))
    if not order:
        runs.sort(key=lambda run: run.recipe.method != (chosen.baseline or "joint"))
    if given["budgets"] is not None:  # a plan's own may be for networks whose runs have failed
        chosen.check_reach(min(float(exit_costs(run, chosen.cost)[0]) for run in runs))
    target = Path(out) if out else Path(folder) / "report"
    with working(f"tables and figures of {len(runs)} runs"):
        comparison = collect(runs, options=chosen, context=context)
        if given["baseline"] is not None:  # a plan's own may be of a method that has failed
            _check_baseline(given["baseline"], comparison)
        files = write_report(comparison, target, runs=runs, formats=wanted)
    if as_json:
        click.echo(as_data(comparison, files))
        return
    print_report(comparison, Console())
    click.echo(f"tables and figures: {target}")


def _check_baseline(name: str, comparison: Comparison) -> None:
    """Refuse a baseline that none of the tables has, with fields or without."""
    methods = dict.fromkeys(comparison.anytime["method"])
    known = [*methods, *(method.split(" ")[0] for method in methods)]
    if name not in known:
        raise unknown("baseline", name, dict.fromkeys(known))


def as_data(comparison: Comparison, files: Sequence[Path]) -> str:
    """Return a comparison as JSON: {"tables": {name: rows}, "files": paths}; the tables are those of the CSV files."""
    tables = {name: json.loads(frame.to_json(orient="records")) for name, frame in comparison.frames().items()}
    return json.dumps({"tables": tables, "files": [str(path) for path in files]}, indent=2)


def split_formats(formats: str | None) -> tuple[str, ...]:
    """Read a list of formats.

    Raises:
        UserError: an unknown one, or none.
    """
    if formats is None:
        return FORMATS
    return some_of("--format", "format", formats, FORMATS)
