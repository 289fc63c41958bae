"""`exitkit report`: tables and figures of finished runs; nothing is trained."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import folders, names, one_of
from exitkit.cli.options import json_option, some_of, target_options
from exitkit.errors import Note, UserError, unknown
from exitkit.escaping import counted

if TYPE_CHECKING:
    from exitkit.benchmarks.campaign.record import Comparisons
    from exitkit.benchmarks.report import Comparison

POLICY_HELP = "Exit policy to compare on the outputs of every method, such as mie+stopping, or all; repeatable."
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
@click.option("--policy", metavar="NAME", multiple=True, help=POLICY_HELP)
@click.option(
    "--budget", "budget", metavar="COST", multiple=True, help="An operating point: 60%, 20M or 1.5ms; repeatable."
)
@target_options
@click.option("--risk", metavar="POINTS", help="Risk control: tolerated loss, with --certainty (0.95).  [default: 1]")
@click.option(
    "--summary",
    metavar="DIR",
    shell_complete=folders,
    help="Also write the runs' small files and measures to DIR, from which `report` makes the same tables.",
)
@click.option("--classes", is_flag=True, default=None, help="Also report the recall of every class.")
@click.option(
    "--times/--no-times",
    default=None,
    help="Report training times and peak memory; not if the runs shared their cores.  [default: times]",
)
@json_option("all tables, as arrays of rows, and the written files")
def report(folder: str, out: str | None, formats: str | None, summary: str | None, as_json: bool, **given: Any) -> None:
    """Print and write the tables and curves of all finished runs in FOLDER.

    A folder may hold several comparisons. FOLDER/comparison-DIGEST.json, the file of one of them, gives the report of
    its runs, with its title and options.

    \b
    Examples:
      exitkit report
      exitkit report study --out paper/tables --format latex,pdf
      exitkit report study --policy mie --policy margin+fitted
      exitkit report study --budgets 10M,20M --rule margin --calibrated
      exitkit report study --summary docs/results/study
      exitkit report study --classes
      exitkit report study --budget 60% --budget 20M --at-most
      exitkit report study --lose 1 --certainty 0.95
      exitkit report study --json
    """
    from exitkit.benchmarks.campaign.record import copy_plan, read_plan
    from exitkit.benchmarks.report import ReportOptions, collect_intact, print_report, write_report, write_summary
    from exitkit.cli.progress import working
    from exitkit.cli.terminal import Console
    from exitkit.inference.budgets import exit_costs
    from exitkit.runs.table import find_runs, intact

    wanted = split_formats(formats)
    given["targets"] = _targets(given)
    comparisons = read_plan(Path(folder))
    source, order, context = comparisons.folder, comparisons.order, comparisons.context
    overrides = {key: value for key, value in given.items() if not (value is None or value == ())}
    chosen = ReportOptions.make(comparisons.report | overrides)
    position = {name: number for number, name in enumerate(order)}
    finished = intact(find_runs(source), records=True)
    if comparisons.only:
        finished = [run for run in finished if run.path.name in position]
    elif len(comparisons.files) > 1:
        warnings.warn(Note(_several(comparisons)), stacklevel=2)
    runs = sorted(finished, key=lambda run: (position.get(run.path.name, len(position)), run.path.name))
    if not order:
        runs.sort(key=lambda run: run.recipe.method != (chosen.baseline or "joint"))
    if given["budgets"] is not None and runs:  # budgets of the plan may be for networks whose runs failed
        costs = [exit_costs(run, chosen.cost) for run in runs]
        chosen.check_reach(min(float(cost[0]) for cost in costs), max(float(cost[-1]) for cost in costs))
    target = Path(out) if out else source / "report"
    with working(f"tables and figures of {counted(len(runs), 'run')}"):
        comparison, runs = collect_intact(runs, chosen, context)
        if given["baseline"] is not None:  # the plan's baseline may be a method whose runs failed
            _check_baseline(given["baseline"], comparison)
        files = write_report(comparison, target, runs=runs, formats=wanted)
        if summary is not None:
            write_summary(comparison, runs, Path(summary))
            copy_plan(comparisons, Path(summary))
    if as_json:
        click.echo(as_data(comparison, files))
        return
    print_report(comparison, Console())
    click.echo(f"tables and figures: {target}")


def _targets(given: dict[str, Any]) -> tuple[str, ...]:
    """Take the options of operating points out of the given ones, and return the targets in words.

    --certainty stays, which is also the confidence level of the risk control.
    """
    at_most = " at-most" if given.pop("at_most") else ""
    certainty = "" if given["certainty"] is None else f" certainty {given['certainty']:g}"
    targets = [f"budget {value}{at_most}" for value in given.pop("budget")]
    for name in ("latency", "latency_p95", "lose", "accuracy"):
        value = given.pop(name)
        if value is not None:
            more = {"latency": at_most, "lose": certainty}.get(name, "")
            text = f"{value:g}" if isinstance(value, float) else value
            targets.append(f"{name.replace('_', '-')} {text}{more}")
    if at_most and not any(target.endswith(at_most) for target in targets):
        raise UserError("--at-most is given without a budget; expected, for example, --budget 60% --at-most")
    return tuple(targets)


def _several(comparisons: Comparisons) -> str:
    """Return the notice that a folder holds several comparisons."""
    files = ", ".join(str(path) for path in comparisons.files[:3])
    more = ", ..." if len(comparisons.files) > 3 else ""
    count = f"{comparisons.folder} holds {len(comparisons.files)} comparisons"
    return f"{count}; this report is of all their runs; for that of one: exitkit report {files}{more}"


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
