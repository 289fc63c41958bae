"""`exitkit compare`: train methods, networks, data sets and seeds under one recipe, and report tables and curves."""

from __future__ import annotations

import json
import shlex
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from exitkit.benchmarks.commands.report import POLICY_HELP
from exitkit.cli.completion import names, one_of
from exitkit.cli.interrupts import interruptible
from exitkit.cli.options import (
    BASELINE,
    DEFAULT_METHODS,
    FiniteFloat,
    json_option,
    parse_sets,
    read_recipe,
    recipe_options,
)
from exitkit.errors import Interrupted, Note, UserError
from exitkit.escaping import counted
from exitkit.files import exists

if TYPE_CHECKING:
    from exitkit.benchmarks.campaign.launchers import Launcher
    from exitkit.benchmarks.campaign.plan import Plan, Planned
    from exitkit.benchmarks.report.options import ReportOptions
    from exitkit.runs.folder import RunFolder
    from exitkit.runs.recipe import ResolvedRecipe


@click.command(short_help="Train several methods and print their tables.")
@click.option(
    "--methods",
    metavar="A,B,...",
    shell_complete=names("methods"),
    help=f"Methods, or all.  [default: {DEFAULT_METHODS}]",
)
@click.option(
    "--baseline",
    metavar="NAME",
    shell_complete=names("methods"),
    help=f"Method that differences refer to.  [default: {BASELINE}]",
)
@click.option("--seeds", type=int, help="Number of seeds.  [default: 2]")
@click.option("--seed", type=int, help="First seed.  [default: 0]")
@click.option(
    "--sweep",
    "sweeps",
    metavar="FIELD=A,B,...",
    multiple=True,
    help="One run per value (A;B;... if values contain commas); repeatable.",
)
@click.option("--static", is_flag=True, default=None, help="Also train one static network per exit, for reference.")
@click.option("--policy", metavar="NAME", multiple=True, help=POLICY_HELP)
@click.option("--plan", "only_plan", is_flag=True, help="Show the planned runs and the estimated time; train nothing.")
@click.option("--no-data", is_flag=True, help="With --plan: read no images; their numbers are from the catalogue.")
@click.option(
    "--seconds-per-run",
    type=FiniteFloat(0, 1e9, min_open=True),
    help="With --plan: training time of a run, such as a GPU's; nothing is timed.",
)
@click.option("--jobs", type=int, help="Parallel runs.  [default: one per core, or per GPU]")
@click.option(
    "--launcher",
    metavar="NAME",
    default="processes",
    shell_complete=one_of("processes", "here", "slurm", "submitit-local"),
    help="processes, here, slurm or submitit-local.",
)
@click.option("--slurm", "slurm", metavar="KEY=VALUE", multiple=True, help="Parameter of submitit; repeatable.")
@click.option("--resume", is_flag=True, help="No effect, as compare always resumes.")
@json_option("with --plan the plan, else all tables as in `exitkit report --json`")
@recipe_options
def compare(
    sets: tuple[str, ...],
    sweeps: tuple[str, ...],
    recipe_file: str | None,
    out: str,
    only_plan: bool,
    no_data: bool,
    seconds_per_run: float | None,
    jobs: int | None,
    launcher: str,
    slurm: tuple[str, ...],
    resume: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train several methods, including the baseline, and print their accuracy and cost.

    --methods, --backbone and --dataset accept comma-separated lists. Every combination is trained, with every seed.
    The same command skips finished runs, resumes unfinished ones and retries failed ones. Several processes may share
    one folder. Tables and figures are written to OUT/report.

    \b
    Examples:
      exitkit compare --methods ge,boostnet,metagf
      exitkit compare --recipe imta-table2-quick --out study
      exitkit compare --methods boostnet --sweep boostnet.temperature=0,0.5,1
      exitkit compare --methods ge --backbone msdnet-cifar-lg4,msdnet-cifar-lg5
      exitkit compare --methods all --dataset cifar100 --data-dir data
      exitkit compare --methods ge,boostnet --policy mie --policy margin+fitted
      exitkit compare --recipe metagf-table1 --plan --json
      exitkit compare --recipe dfs-table1 --plan --no-data --seconds-per-run 1800
    """
    from exitkit.benchmarks.campaign.plan import Plan
    from exitkit.cli.progress import loading

    if resume:
        warnings.warn(Note("--resume has no effect: compare always resumes"), stacklevel=1)
    for option, value in (("--no-data", no_data), ("--seconds-per-run", seconds_per_run is not None)):
        if value and not only_plan:
            raise UserError(f"{option} is given without --plan; expected both: it changes only the estimates")
    with loading("torch"):
        import torch  # noqa: F401
    plan = Plan.make(_values(read_recipe(recipe_file), given, parse_sets(sets), parse_sweeps(sweeps)))
    folder = Path(out)
    if exists(folder) and not folder.is_dir():
        raise UserError(f"--out {out} is a file; expected a folder, or a new name")
    if "toy" in plan.figures:
        if as_json:
            raise UserError("the recipe draws a figure and trains nothing; expected no --json")
        if only_plan:
            click.echo("plan: the toy problem of two exits; takes seconds")
            return
        from exitkit.benchmarks.commands.diagnose import draw_toy

        draw_toy(folder / "report")
        return
    estimate = Estimates(seconds_per_run, not no_data)
    carry_out(plan, folder, jobs, launcher, parse_sets(slurm, "--slurm"), only_plan, as_json, estimate)


class Estimates(NamedTuple):
    """How times are estimated: see `Estimate`."""

    seconds_per_run: float | None = None
    read_data: bool = True


def carry_out(
    plan: Plan,
    folder: Path,
    jobs: int | None = None,
    launcher: str = "processes",
    slurm: Mapping[str, str] | None = None,
    only_plan: bool = False,
    as_json: bool = False,
    estimates: Estimates | None = None,
) -> None:
    """Train the runs of a plan that are not finished, and write and print their report.

    Args:
        plan: the plan.
        folder: the folder of the runs.
        jobs: parallel runs; None: one per core, or per GPU.
        launcher, slurm: see `make_launcher`.
        only_plan: show the planned runs and the estimated time, and train nothing.
        as_json: print JSON.
        estimates: how times are estimated; None: by finished runs, or by timed steps.

    Raises:
        UserError: a run failed, or something is wrong before training; see `_announce`.
    """
    from exitkit.benchmarks.campaign.launchers import check_importable, default_jobs, make_launcher
    from exitkit.benchmarks.report.options import ReportOptions
    from exitkit.runs.folder import RunFolder
    from exitkit.runs.job import check_effects

    runs = plan.runs()
    first = runs[0].recipe
    workers = default_jobs(first.device, first.threads) if jobs is None else jobs
    if workers < 1:
        raise UserError(f"--jobs is {workers}; expected at least 1")
    if launcher == "here" and jobs not in (None, 1):
        raise UserError(f"--jobs is {jobs}; expected 1 with --launcher here, which trains one run at a time")
    recipes = {planned.recipe.id: planned.recipe for planned in runs}
    for planned in runs:
        if not exists(folder / planned.recipe.id):
            check_effects(planned.given)
    needed = recipes | {teacher.id: teacher for teacher in _teachers(list(recipes.values()))}
    starter = make_launcher(launcher, workers, first, folder, slurm or {})
    if launcher != "here":
        check_importable(needed.values())
    try:
        with interruptible():
            options = ReportOptions.make(plan.report)
            if options.cost == "latency" and not all(RunFolder.is_finished(folder / name) for name in needed):
                raise UserError(
                    "the report's cost is latency, which new runs do not have; expected macs or papers, and after "
                    "exitkit bench: exitkit report --cost latency"
                )
            how = estimates or Estimates()
            todo = _announce(needed, folder, starter, jobs is not None, only_plan, as_json, options, how)
            if only_plan:
                return
            failed = _train(todo, len(needed), folder, starter, plan, runs)
    except KeyboardInterrupt:
        raise Interrupted("stopped; run the same command again to resume") from None
    errors = [_reasons(failed, len(needed))] if failed else []
    if len(failed) < len(needed):
        try:
            publish(folder, plan, runs, as_json)
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("; ".join(errors))


def _values(
    values: Mapping[str, Any], given: Mapping[str, Any], sets: Mapping[str, str], sweeps: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Override the values of a recipe, and of its parts, with those of the command line."""
    options = {key: value for key, value in given.items() if not (value is None or value == ())}
    if "policy" in options:
        options["policy"] = list(options["policy"])
    for key in options.keys() & {"backbone", "dataset"}:
        options[key] = _replaced([name.strip() for name in options[key].split(",") if name.strip()], values.get(key))

    def override(table: Mapping[str, Any], keep: bool) -> dict[str, Any]:
        merged = {key: value for key, value in table.items() if key not in options} | (options if keep else {})
        for key, more in (("set", sets), ("sweep", sweeps)):
            if more and (keep or key in table):
                earlier = table.get(key, {})
                merged[key] = {**(earlier if isinstance(earlier, Mapping) else {}), **more}
        return merged

    merged = override(values, keep=True)
    if isinstance(values.get("parts"), list):
        parts = values["parts"]
        merged["parts"] = [override(part, keep=False) if isinstance(part, Mapping) else part for part in parts]
    return merged


def _replaced(names: list[str], before: Any) -> list[Any]:
    """Return entries for the new names; each keeps the `stands_for` of the entry at the same position before."""
    entries = before if isinstance(before, list) else [before]
    references = [entry.get("stands_for") if isinstance(entry, Mapping) else None for entry in entries]
    references += [None] * (len(names) - len(references))
    return [{"name": n, "stands_for": s} if s else n for n, s in zip(names, references, strict=False)]


def parse_sweeps(sweeps: Sequence[str]) -> dict[str, list[str]]:
    """Parse `field=a,b,c`, or `field=1,2;1,3` where the values contain commas.

    Raises:
        UserError: a sweep has no equals sign or no value, or a field occurs twice.
    """
    values = {}
    for field, text in parse_sets(tuple(sweeps), "--sweep").items():
        values[field] = [value.strip() for value in text.split(";" if ";" in text else ",") if value.strip()]
        if not values[field]:
            raise UserError(f"--sweep {field}= has no values; expected for example {field}=0,0.5,1")
    return values


def _announce(
    needed: Mapping[str, ResolvedRecipe],
    folder: Path,
    launcher: Launcher,
    fixed: bool,
    whole: bool,
    as_json: bool,
    options: ReportOptions,
    how: Estimates,
) -> list[ResolvedRecipe]:
    """Show the plan with the estimated time and memory, and return the recipes that are to be trained.

    The parallel runs of the launcher are limited to the memory of the machine, unless their number is `fixed`.

    Raises:
        UserError: images are missing, a network can't be built, a policy of the report can't be applied to it, or a
            budget of the report is below the cost of every first exit. All of this is checked before training.
    """
    from exitkit.benchmarks.campaign.display import announce
    from exitkit.benchmarks.campaign.estimate import Estimate, wall_time
    from exitkit.benchmarks.campaign.launchers import fit_memory
    from exitkit.cli.progress import loading
    from exitkit.engine.devices import choose_device
    from exitkit.runs.fingerprints import check_same
    from exitkit.runs.folder import RESULTS, RunFolder

    todo = [recipe for recipe in needed.values() if not exists(folder / recipe.id / RESULTS)]
    if how.read_data:
        check_same((RunFolder(folder / name), recipe) for name, recipe in needed.items() if recipe not in todo)
    with loading("the data, and timing a few steps"):
        estimate = Estimate(folder, *how)
        images = estimate.images(todo, check=not whole)
        seconds = {recipe.id: estimate.seconds(recipe) for recipe in todo}
        peaks = {recipe.id: estimate.peak_mib(recipe) for recipe in todo}
        peaks = {name: peak for name, peak in peaks.items() if peak == peak}  # NaN: unknown
        if options.reads_embeddings and how.read_data:
            for recipe in needed.values():
                estimate.check_linear(recipe)
        if todo and how.read_data and options.budgets and options.cost != "latency":
            costs = [[getattr(exit, options.cost) for exit in estimate.costs(recipe)] for recipe in needed.values()]
            options.check_reach(min(cost[0] for cost in costs), max(cost[-1] for cost in costs))
    if any(choose_device(recipe.device).type == "cpu" for recipe in todo):
        fit_memory(launcher, list(peaks.values()), fixed=fixed)
    workers = launcher.slots
    if whole and as_json:
        runs = [_planned(name, recipe, seconds.get(name), peaks.get(name)) for name, recipe in needed.items()]
        about = {
            "images": images,
            "runs": runs,
            "at_once": workers,
            "seconds": wall_time([known for known in seconds.values() if known == known], workers),
            "unknown": sum(each != each for each in seconds.values()),
        }
        click.echo(json.dumps(about, indent=2))
    else:
        announce(list(needed.values()), images, seconds, peaks, workers, whole)
    return todo


def _planned(name: str, recipe: ResolvedRecipe, seconds: float | None, peak: float | None) -> dict[str, Any]:
    """Return the entry of a run in `--plan --json`; `seconds` and `peak` (MiB) are None if it is finished.

    Seconds that are unknown (NaN) are null.
    """
    names = {key: getattr(recipe, key) for key in ("method", "backbone", "dataset", "seed", "epochs")}
    known = 0.0 if seconds is None else None if seconds != seconds else seconds
    estimate = {"seconds": known, "peak_mib": peak}
    return {"run": name, **names, "finished": seconds is None, **estimate}


def _train(
    todo: list[ResolvedRecipe], planned: int, folder: Path, launcher: Any, plan: Plan, runs: Sequence[Planned]
) -> dict[str, str]:
    """Train the unfinished runs, and return {name: reason} of the failed ones."""
    from exitkit.benchmarks.campaign.display import CampaignDisplay
    from exitkit.benchmarks.campaign.queue import Campaign
    from exitkit.benchmarks.campaign.record import write_plan

    write_plan(folder, plan, runs, _command_line())
    if not todo:
        return {}
    with CampaignDisplay(todo, planned) as display:
        launcher.on_progress = display
        failed = Campaign(todo, folder, launcher, display).run()
    return {todo[index].id: reason for index, reason in failed.items()}


_LOCAL = (
    *("out", "data_dir", "device", "deterministic", "threads", "jobs"),
    *("launcher", "slurm", "resume", "tensorboard", "as_json"),
)
"""Options that do not change the results: paths, devices, scheduling and output."""


def _command_line() -> str:
    """Return the command line without the options that depend on the machine."""
    context = click.get_current_context()
    words = ["exitkit", str(context.info_name)]
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if parameter.name in _LOCAL or value is None or value is False or value == ():
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [parameter.opts[0]] + ([] if item is True else [str(item)])
    return shlex.join(words)


def _reasons(failed: Mapping[str, str], planned: int) -> str:
    """Return a message that lists the failed runs, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in failed.items():
        reasons.setdefault(reason, []).append(name)
    if len(reasons) == 1 and len(failed) == planned:
        return next(iter(reasons))
    return "; ".join(f"failed: {', '.join(names)}: {reason}" for reason, names in reasons.items())


def _teachers(recipes: list[ResolvedRecipe]) -> list[ResolvedRecipe]:
    """Return the recipes of the teachers of these recipes."""
    from exitkit.runs.ingredients import teacher_recipes

    return [teacher for recipe in recipes for teacher in teacher_recipes(recipe).values()]


def publish(out: Path, plan: Plan, planned: Sequence[Planned], as_json: bool = False) -> None:
    """Write and print the report of the finished runs of this plan, and draw its figures.

    Other comparisons may have their runs in the same folder; the report is of this one.
    """
    from exitkit.benchmarks.campaign.record import context_of, report_options
    from exitkit.benchmarks.commands.report import as_data
    from exitkit.benchmarks.report import ReportOptions, collect_intact, print_report, write_report
    from exitkit.cli.progress import working
    from exitkit.cli.terminal import Console
    from exitkit.runs.folder import DIAGNOSTICS, RESULTS, RunFolder

    recipes = {run.recipe.id: run.recipe for run in planned}
    runs = [RunFolder(out / name) for name in recipes if exists(out / name / RESULTS)]
    if "diagnose" in plan.figures:
        from exitkit.benchmarks.commands.diagnose import draw_run, messages_to_stderr

        for run in runs:
            if run.recipe.seed != plan.base.seed:
                continue
            try:
                with messages_to_stderr(as_json):
                    draw_run(run, run.path / DIAGNOSTICS, data_dir=recipes[run.path.name].data_dir)
            except UserError as error:
                warnings.warn(Note(f"not diagnosed: {error}"), stacklevel=2)
    options = ReportOptions.make(report_options(plan))
    if options.reads_embeddings:
        _embed([(run, recipes[run.path.name]) for run in runs])
    with working(f"tables and figures of {counted(len(runs), 'run')}"):
        context = context_of(out, plan, planned, _command_line())
        comparison, runs = collect_intact(runs, options, context)
        files = write_report(comparison, out / "report", runs=runs)
    if as_json:
        click.echo(as_data(comparison, files))
    else:
        print_report(comparison, Console())
    click.echo(f"tables and figures: {out / 'report'}", err=as_json)


def _embed(runs: Sequence[tuple[RunFolder, ResolvedRecipe]]) -> None:
    """Evaluate runs again that have no stored embeddings, which policies of the report read."""
    from exitkit.cli.progress import working
    from exitkit.runs.evaluate import evaluate
    from exitkit.runs.folder import RunFolder

    for run, recipe in runs:
        while not run.has_embeddings():
            if RunFolder.is_held(run.path):  # another process evaluates it
                time.sleep(1)
                continue
            with working(f"embeddings of {run.path.name}") as report:
                evaluate(run, device=recipe.device, data_dir=recipe.data_dir, embeddings=True, tell=report)
