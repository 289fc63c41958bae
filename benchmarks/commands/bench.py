"""`exitkit bench`: measured latency of trained networks: per exit, with early exit, and of a static network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from exitkit.cli.completion import one_of
from exitkit.cli.completion import runs as complete_runs
from exitkit.cli.interrupts import interruptible
from exitkit.cli.options import data_dir_option, device_option, json_option
from exitkit.errors import Interrupted, UserError, unknown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from exitkit.benchmarks.timing.stopwatch import Boundary, Point, Subject
    from exitkit.runs.folder import RunFolder

MODES = {"latency": 1, "throughput": 256}
"""{mode: default batch size}."""
BOUNDARIES = ("model", "end-to-end")
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Default operating points: q, the ratio of the exit shares of consecutive exits."""


@click.command(short_help="Measure the latency of exits and of early exit.")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, shell_complete=complete_runs)
@click.option(
    "--mode",
    metavar="NAME",
    default="latency",
    show_default=True,
    shell_complete=one_of(*MODES),
    help="latency (batch size 1) or throughput (256).",
)
@click.option(
    "--boundary",
    metavar="NAME",
    default="model",
    show_default=True,
    shell_complete=one_of(*BOUNDARIES),
    help="model, or end-to-end: includes reading images and returning classes.",
)
@click.option("--batch-size", type=int, help="Batch size.  [default: of --mode]")
@click.option("--budget", "budgets", metavar="AMOUNT", multiple=True, help="Average budget, such as 40M; repeatable.")
@click.option("--repeats", type=int, default=50, show_default=True, help="Measured rounds, each on different images.")
@click.option("--threads", type=int, default=1, show_default=True, help="CPU threads.")
@device_option("[default: auto]", "auto")
@data_dir_option
@json_option("all measurements")
def bench(
    runs: tuple[str, ...],
    mode: str,
    boundary: str,
    batch_size: int | None,
    budgets: tuple[str, ...],
    repeats: int,
    threads: int,
    device: str,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Measure the latency of trained runs in milliseconds per image, and store it in the run folders.

    Three latencies are measured on test images: the time until each exit predicts; early exit at several operating
    points, with thresholds from validation; and, per operating point, the network cut at the first exit that is as
    accurate on validation. Each round measures all runs on the same images, in alternating order. `exitkit report
    --cost latency` then uses milliseconds as the cost.

    \b
    Examples:
      exitkit bench runs/*
      exitkit bench RUN --mode throughput --boundary end-to-end
      exitkit bench RUN --budget 40M --budget 60M --json
    """
    from exitkit.runs.folder import RunFolder

    batch_size = _check(mode, boundary, batch_size)
    for name, value in (("--batch-size", batch_size), ("--repeats", repeats), ("--threads", threads)):
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")
    folders = [RunFolder(name) for name in only_runs(list(dict.fromkeys(runs)))]
    for folder in folders:
        folder.results()  # raises for an unfinished run
    try:
        with interruptible():
            settings = {"batch_size": batch_size, "repeats": repeats, "threads": threads, "boundary": boundary}
            measured = _measure(folders, budgets, device, data_dir, settings)
    except KeyboardInterrupt:
        raise Interrupted("stopped; nothing was written") from None
    for folder, facts in measured.items():
        _write(folder, {"mode": mode} | facts)
    if as_json:
        click.echo(json.dumps({folder.path.name: facts for folder, facts in measured.items()}, indent=2))
    else:
        _print(measured, batch_size, boundary)


def only_runs(names: list[str]) -> list[str]:
    """Drop paths that are not runs (`runs/*` also matches `report`, `comparison.json`), unless no run remains."""
    from exitkit.benchmarks.campaign.record import FAILURES, PLAN
    from exitkit.files import exists

    others = [name for name in names if exists(Path(name)) and not Path(name, "recipe.json").is_file()]
    kept = [name for name in names if name not in others]
    if not any(exists(Path(name)) for name in kept):
        return names
    for name in others:
        if Path(name).name not in ("report", "slurm", PLAN, FAILURES):
            click.echo(f"skipped {name}: not a run folder", err=True)
    return kept


def _check(mode: str, boundary: str, batch_size: int | None) -> int:
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if boundary not in BOUNDARIES:
        raise unknown("boundary", boundary, BOUNDARIES)
    return MODES[mode] if batch_size is None else batch_size


def _measure(
    folders: Sequence[RunFolder], budgets: Sequence[str], device: str, data_dir: str | None, settings: Mapping[str, Any]
) -> dict[RunFolder, dict[str, Any]]:
    import torch

    from exitkit.benchmarks.timing.stopwatch import time_all
    from exitkit.engine.devices import choose_device
    from exitkit.engine.engine import Engine

    engine = Engine(choose_device(device))
    subjects = {folder: _subject(folder, budgets, data_dir, engine) for folder in folders}
    first, *others = subjects
    for folder in others:
        if not torch.equal(subjects[first].data.split.test, subjects[folder].data.split.test) or (
            first.recipe.dataset != folder.recipe.dataset
        ):
            raise UserError(f"{first.path} and {folder.path} have different test images; expected runs on one data set")
    before = torch.get_num_threads()
    torch.set_num_threads(settings["threads"])
    try:
        boundary = cast("Boundary", settings["boundary"])
        time_all(list(subjects.values()), settings["batch_size"], settings["repeats"], boundary)
    finally:
        torch.set_num_threads(before)
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else None
    where = {"device": str(engine.device), "gpu": gpu, "torch": torch.__version__}
    return {folder: _facts(subject, settings) | dict(settings) | where for folder, subject in subjects.items()}


def _subject(run: RunFolder, budgets: Sequence[str], data_dir: str | None, engine: Any) -> Subject:
    from exitkit.benchmarks.timing.stopwatch import Subject
    from exitkit.runs.job import load_network, load_run_data

    data = load_run_data(run, data_dir)
    network = load_network(run, data)
    engine.place(network)
    return Subject(network, data, engine, _points(run, budgets))


def _points(run: RunFolder, budgets: Sequence[str]) -> list[Point]:
    """Return the operating points of a run, each with the first exit that is as accurate on validation."""
    import numpy as np

    from exitkit.benchmarks.timing.stopwatch import Point
    from exitkit.inference.choose import rule_of_run
    from exitkit.inference.scores import scores
    from exitkit.inference.thresholds import correct, leave_at, realised

    rules = {f"budget {budget}": rule_of_run(run, budget=budget) for budget in budgets} or {
        f"q = {share:g}": rule_of_run(run, share=share) for share in SHARES
    }
    validation = run.outputs("validation")
    hits, values = correct(validation["logits"], validation["labels"]), scores(validation["logits"], "confidence")
    points = []
    for name, rule in rules.items():
        accuracy = realised(leave_at(values, [rule.thresholds]), hits, range(hits.shape[1])).accuracy[0]
        enough = np.append(hits.mean(axis=0)[:-1] >= accuracy, True)
        points.append(Point(name, rule, int(enough.argmax()) + 1))
    return points


def _facts(subject: Subject, settings: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    from exitkit.benchmarks.timing.stopwatch import cut_name, summary

    size, repeats = settings["batch_size"], settings["repeats"]

    def timing(name: str) -> dict[str, Any]:
        used = subject.joules.get(name)
        joules = None if used is None else used / (size * repeats)
        return {"name": name, **summary(subject.seconds[name], size), "joules_per_image": joules}

    exits = [summary(column, size) for column in np.transpose(subject.exits)]
    points = [
        timing(point.name)
        | {"rule": json.loads(point.rule.to_json())}
        | {"static": timing(cut_name(point.matched)) | {"exit": point.matched}}
        for point in subject.points
    ]
    return {"milliseconds": [row["p50"] for row in exits], "exits": exits, "points": points}


def _print(measured: Mapping[RunFolder, Mapping[str, Any]], batch_size: int, boundary: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    for folder, facts in measured.items():
        table = Table(title=f"{escape(folder.path.name)}: milliseconds per image, batch size {batch_size}, {boundary}")
        for name in ("", "p50", "p95", "p99", "mean", "images/s", "J/image", "static, cut at", "static mean"):
            table.add_column(name, justify="left" if not name else "right")
        for number, row in enumerate(facts["exits"], start=1):
            table.add_row(f"exit {number}", *_numbers(row))
        for point in facts["points"]:
            static = point["static"]
            table.add_row(escape(point["name"]), *_numbers(point), f"exit {static['exit']}", f"{static['mean']:.3g}")
        console.print(table)
    if all(point["joules_per_image"] is None for facts in measured.values() for point in facts["points"]):
        console.print("energy: not available on this machine")


def _numbers(row: Mapping[str, Any]) -> list[str]:
    numbers = [f"{row[key]:.3g}" for key in ("p50", "p95", "p99", "mean", "images_per_second")]
    joules = row.get("joules_per_image")
    return [*numbers, "" if joules is None else f"{joules:.3g}"]


def _write(run: RunFolder, facts: dict[str, Any]) -> None:
    from exitkit.files import write_json
    from exitkit.runs.folder import LATENCY

    write_json(run.path / LATENCY, facts)
