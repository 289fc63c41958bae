"""`exitkit report`: tables and figures of finished runs; nothing is trained."""

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


@click.command(short_help="Print and write the tables of finished runs.")
@click.argument("folder", metavar="FOLDER", default="runs", shell_complete=folders)
@click.option("--out", metavar="DIR", shell_complete=folders, help="Output folder.  [default: FOLDER/report]")
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
    help="Method that differences refer to.  [default: joint, or the first]",
)
@click.option(
    "--cost",
    metavar="NAME",
    shell_complete=one_of("macs", "papers", "latency"),
    help="macs, papers (the papers' count) or latency (ms).  [default: macs]",
)
@click.option("--points", metavar="P", help="Number of operating points: q = p / 20 for p = 1..P.  [default: 39]")
@click.option(
    "--rule",
    metavar="NAME",
    shell_complete=one_of("confidence", "margin", "entropy", "patience"),
    help="confidence, margin, entropy or patience.  [default: confidence]",
)
@click.option("--calibrated", is_flag=True, default=None, help="Calibrate each exit on validation first.")
@click.option(
    "--hold",
    is_flag=True,
    default=None,
    help="Replace points that do not improve validation accuracy by the previous one.",
)
@click.option("--budgets", metavar="A,B,...", help="Average budgets, such as 40M,60M or 1.5ms.  [default: nine]")
@click.option("--risk", metavar="POINTS", help="Risk control: tolerated loss of accuracy.  [default: 1]")
@click.option("--certainty", metavar="SHARE", help="Risk control: confidence level.  [default: 0.95]")
@json_option("all tables, as arrays of rows, and the written files")
def report(folder: str, out: str | None, formats: str | None, as_json: bool, **given: Any) -> None:
    """Print and write the tables and curves of all finished runs in FOLDER.

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
    overrides = {key: value for key, value in given.items() if value is not None}
    chosen = ReportOptions.make(options | overrides)
    position = {name: number for number, name in enumerate(order)}
    runs = sorted(find_runs(folder), key=lambda run: (position.get(run.path.name, len(position)), run.path.name))
    if not order:
        runs.sort(key=lambda run: run.recipe.method != (chosen.baseline or "joint"))
    if given["budgets"] is not None:  # budgets of the plan may be for networks whose runs failed
        chosen.check_reach(min(float(exit_costs(run, chosen.cost)[0]) for run in runs))
    target = Path(out) if out else Path(folder) / "report"
    with working(f"tables and figures of {len(runs)} runs"):
        comparison = collect(runs, options=chosen, context=context)
        if given["baseline"] is not None:  # the plan's baseline may be a method whose runs failed
            _check_baseline(given["baseline"], comparison)
        files = write_report(comparison, target, runs=runs, formats=wanted)
    if as_json:
        click.echo(as_data(comparison, files))
        return
    print_report(comparison, Console())
    click.echo(f"tables and figures: {target}")


def _check_baseline(name: str, comparison: Comparison) -> None:
    """Raise UserError if no table has the baseline, given with or without its settings."""
    methods = dict.fromkeys(comparison.anytime["method"])
    known = [*methods, *(method.split(" ")[0] for method in methods)]
    if name not in known:
        raise unknown("baseline", name, dict.fromkeys(known))


def as_data(comparison: Comparison, files: Sequence[Path]) -> str:
    """Return a comparison as JSON: {"tables": {name: rows}, "files": paths}, with the same tables as the CSV files."""
    tables = {name: json.loads(frame.to_json(orient="records")) for name, frame in comparison.frames().items()}
    return json.dumps({"tables": tables, "files": [str(path) for path in files]}, indent=2)


def split_formats(formats: str | None) -> tuple[str, ...]:
    """Parse a comma-separated list of formats; None means all.

    Raises:
        UserError: the list is empty, or a format is unknown.
    """
    if formats is None:
        return FORMATS
    return some_of("--format", "format", formats, FORMATS)
