"""`exitkit bench`: how long trained networks really take: each exit, early exit, and a smaller network as accurate."""

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
"""Each mode's images at once, unless told otherwise."""
BOUNDARIES = ("model", "end-to-end")
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The operating points unless budgets are given: q, the ratio between the shares of neighbouring exits."""


@click.command(short_help="Measure how long exits and early exit really take.")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, shell_complete=complete_runs)
@click.option(
    "--mode",
    metavar="NAME",
    default="latency",
    show_default=True,
    shell_complete=one_of(*MODES),
    help="latency (1 image at once) or throughput (256).",
)
@click.option(
    "--boundary",
    metavar="NAME",
    default="model",
    show_default=True,
    shell_complete=one_of(*BOUNDARIES),
    help="model, or end-to-end: reading images and fetching classes count.",
)
@click.option("--batch-size", type=int, help="Images at once.  [default: the mode's]")
@click.option("--budget", "budgets", metavar="AMOUNT", multiple=True, help="An average budget (40M); repeatable.")
@click.option("--repeats", type=int, default=50, show_default=True, help="How often, each time on other images.")
@click.option("--threads", type=int, default=1, show_default=True, help="CPU threads.")
@device_option("[default: auto]", "auto")
@data_dir_option
@json_option("all that was measured")
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
    """Measure the milliseconds an image of trained runs, on their test images, and keep them in the run folders.

    Timed are: until each exit answers; early exit at several operating points, thresholds from validation; and for
    each of these the smallest part of the same network, cut at one exit, that is as accurate on validation. Runs take
    turns, round by round, on the same images. `exitkit report --cost latency` then has milliseconds on its axes.

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
    folders = [RunFolder(name) for name in _without_others(list(dict.fromkeys(runs)))]
    for folder in folders:
        folder.results()  # says how to go on with one that is not finished
    try:
        with interruptible():
            asked = {"batch_size": batch_size, "repeats": repeats, "threads": threads, "boundary": boundary}
            found = _measure(folders, budgets, device, data_dir, asked)
    except KeyboardInterrupt:
        raise Interrupted("stopped; nothing was written") from None
    for folder, facts in found.items():
        _write(folder, {"mode": mode} | facts)
    if as_json:
        click.echo(json.dumps({folder.path.name: facts for folder, facts in found.items()}, indent=2))
    else:
        _print(found, batch_size, boundary)


def _without_others(names: list[str]) -> list[str]:
    """Leave out what a shell's star finds beside runs (`report`, `comparison.json`, ...), if any run is left."""
    from exitkit.benchmarks.campaign.record import FAILURES, PLAN
    from exitkit.files import exists

    others = [name for name in names if exists(Path(name)) and not Path(name, "recipe.json").is_file()]
    found = [name for name in names if name not in others]
    if not any(exists(Path(name)) for name in found):
        return names
    for name in others:
        if Path(name).name not in ("report", "slurm", PLAN, FAILURES):
            click.echo(f"left out {name}: it holds no run", err=True)
    return found


def _check(mode: str, boundary: str, batch_size: int | None) -> int:
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if boundary not in BOUNDARIES:
        raise unknown("boundary", boundary, BOUNDARIES)
    return MODES[mode] if batch_size is None else batch_size


def _measure(
    folders: Sequence[RunFolder], budgets: Sequence[str], device: str, data_dir: str | None, asked: Mapping[str, Any]
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
            raise UserError(f"{first.path} and {folder.path} have other test images; expected runs of one data set")
    before = torch.get_num_threads()
    torch.set_num_threads(asked["threads"])
    try:
        boundary = cast("Boundary", asked["boundary"])
        time_all(list(subjects.values()), asked["batch_size"], asked["repeats"], boundary)
    finally:
        torch.set_num_threads(before)
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else None
    where = {"device": str(engine.device), "gpu": gpu, "torch": torch.__version__}
    return {folder: _facts(subject, asked) | dict(asked) | where for folder, subject in subjects.items()}


def _subject(run: RunFolder, budgets: Sequence[str], data_dir: str | None, engine: Any) -> Subject:
    from exitkit.benchmarks.timing.stopwatch import Subject
    from exitkit.runs.job import load_network, load_run_data

    data = load_run_data(run, data_dir)
    network = load_network(run, data)
    engine.place(network)
    return Subject(network, data, engine, _points(run, budgets))


def _points(run: RunFolder, budgets: Sequence[str]) -> list[Point]:
    """Return a run's operating points, each with the first exit that is as accurate on validation."""
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


def _facts(subject: Subject, asked: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    from exitkit.benchmarks.timing.stopwatch import cut_name, summary

    size, repeats = asked["batch_size"], asked["repeats"]

    def told(name: str) -> dict[str, Any]:
        used = subject.joules.get(name)
        joules = None if used is None else used / (size * repeats)
        return {"name": name, **summary(subject.seconds[name], size), "joules_per_image": joules}

    exits = [summary(column, size) for column in np.transpose(subject.exits)]
    points = [
        told(point.name)
        | {"rule": json.loads(point.rule.to_json()), "static": told(cut_name(point.matched)) | {"exit": point.matched}}
        for point in subject.points
    ]
    return {"milliseconds": [row["p50"] for row in exits], "exits": exits, "points": points}


def _print(found: Mapping[RunFolder, Mapping[str, Any]], batch_size: int, boundary: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    for folder, facts in found.items():
        table = Table(title=f"{escape(folder.path.name)}: milliseconds an image, {batch_size} at once, {boundary}")
        for name in ("", "p50", "p95", "p99", "mean", "images/s", "J/image", "as accurate, cut", "its mean"):
            table.add_column(name, justify="left" if not name else "right")
        for number, row in enumerate(facts["exits"], start=1):
            table.add_row(f"exit {number}", *_numbers(row))
        for point in facts["points"]:
            static = point["static"]
            table.add_row(escape(point["name"]), *_numbers(point), f"at exit {static['exit']}", f"{static['mean']:.3g}")
        console.print(table)
    if all(point["joules_per_image"] is None for facts in found.values() for point in facts["points"]):
        console.print("energy: this machine does not tell it")


def _numbers(row: Mapping[str, Any]) -> list[str]:
    numbers = [f"{row[key]:.3g}" for key in ("p50", "p95", "p99", "mean", "images_per_second")]
    joules = row.get("joules_per_image")
    return [*numbers, "" if joules is None else f"{joules:.3g}"]


def _write(run: RunFolder, facts: dict[str, Any]) -> None:
    from exitkit.files import write_json
    from exitkit.runs.folder import LATENCY

    write_json(run.path / LATENCY, facts)
