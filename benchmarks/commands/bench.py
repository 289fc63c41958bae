"""`exitkit bench`: measured latency of trained networks: per exit, with early exit, and of a static network."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import click

from exitkit.cli.completion import one_of
from exitkit.cli.completion import runs as complete_runs
from exitkit.cli.interrupts import interruptible
from exitkit.cli.options import (
    data_dir_option,
    device_option,
    json_option,
    only_runs,
    policy_option,
    target_options,
)
from exitkit.errors import Interrupted, UserError, unknown
from exitkit.escaping import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from exitkit.benchmarks.timing.stopwatch import Boundary, Point, Subject
    from exitkit.cli.terminal import Console
    from exitkit.inference.choose import ChosenPolicy
    from exitkit.inference.policy import ExitPolicy
    from exitkit.inference.targets import Target
    from exitkit.runs.folder import RunFolder

MODES = {"latency": 1, "throughput": 256, "stream": 1}
"""{mode: default batch size}."""
BOUNDARIES = ("model", "end-to-end")
_LARGEST_BATCH = 65_536
_QUEUED = 4
"""Batches per round of throughput, from which early exit refills the batches of the deep stages."""
ENGINE_NAMES = ("eager", "folded", "compiled", "onnx", "auto")
"""Of `exitkit.inference.engines`, which needs torch."""
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
    help="latency (batch size 1), throughput (256), or stream: latency under load.",
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
@click.option(
    "--budget", "budgets", metavar="AMOUNT", multiple=True, help="Average budget, such as 40M or 60%; repeatable."
)
@target_options
@policy_option
@click.option(
    "--engine",
    "engines",
    metavar="NAME",
    multiple=True,
    default=["eager"],
    shell_complete=one_of(*ENGINE_NAMES),
    help="eager, folded, compiled, onnx or auto; repeatable.  [default: eager]",
)
@click.option("--repeats", type=int, default=50, show_default=True, help="Measured rounds, each on different images.")
@click.option("--threads", type=click.IntRange(max=1024), default=1, show_default=True, help="CPU threads.")
@device_option("[default: auto]", "auto")
@data_dir_option
@json_option("all measurements")
def bench(
    runs: tuple[str, ...],
    mode: str,
    boundary: str,
    batch_size: int | None,
    budgets: tuple[str, ...],
    policy: str | None,
    engines: tuple[str, ...],
    repeats: int,
    threads: int,
    device: str,
    data_dir: str | None,
    as_json: bool,
    **target: Any,
) -> None:
    """Measure the latency of trained runs in milliseconds per image, and store it in the run folders.

    Three latencies are measured on test images: the time until each exit predicts; early exit at several operating
    points, with thresholds from validation; and, per operating point, the static network that always uses the first
    exit as accurate on validation, in two forms: pruned to this exit, and the stages up to it, of which the faster one
    counts. --policy measures another policy, by its name in `exitkit policies`; without --budget at its lowest-cost
    point without loss of accuracy. Each round measures all runs and engines on the same images, in alternating order.
    `exitkit report --cost latency` then uses milliseconds as the cost, those of the first --engine.

    --mode throughput gives early exit several batches at once, so that the images that remain refill the batches of
    the deep stages. --mode stream also simulates a queue: images arrive at random times and are served one by one, each
    for the time measured for it. The tables show the median and the 99th percentile of latency, waiting included, as a
    function of the load.

    \b
    Examples:
      exitkit bench runs/*
      exitkit bench RUN --mode throughput --boundary end-to-end
      exitkit bench RUN --budget 40M --budget 60M --json
      exitkit bench RUN --mode stream --repeats 500 --budget 40M
      exitkit bench RUN --engine eager --engine folded --engine onnx
      exitkit bench RUN --policy mie+stopping --budget 40M
    """
    from exitkit.benchmarks.campaign.record import BESIDE
    from exitkit.runs.folder import RunFolder

    batch_size = _check(mode, boundary, engines, batch_size)
    for name, value in (("--batch-size", batch_size), ("--repeats", repeats), ("--threads", threads)):
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")
    folders = [RunFolder(name) for name in only_runs(list(dict.fromkeys(runs)), BESIDE)]
    for folder in folders:
        folder.results()  # raises for an unfinished run
    try:
        with interruptible():
            settings = {
                "mode": mode,
                "batch_size": batch_size,
                "batches": _QUEUED if mode == "throughput" else 1,
                "repeats": repeats,
                "threads": threads,
                "boundary": boundary,
            }
            measured = _measure(folders, _targets(budgets, target), policy, engines, device, data_dir, settings)
    except KeyboardInterrupt:
        raise Interrupted("stopped; nothing was written") from None
    if as_json:
        names = Counter(folder.path.name for folder in measured)
        keys = {folder: folder.path.name if names[folder.path.name] == 1 else str(folder.path) for folder in measured}
        click.echo(json.dumps({keys[folder]: facts for folder, facts in measured.items()}, indent=2))
    else:
        _print(measured, batch_size, boundary)
    for folder, facts in measured.items():  # after the table, which a folder that can't be written does not cost
        _write(folder, facts)


def _check(mode: str, boundary: str, engines: Sequence[str], batch_size: int | None) -> int:
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if boundary not in BOUNDARIES:
        raise unknown("boundary", boundary, BOUNDARIES)
    if wrong := [name for name in engines if name not in ENGINE_NAMES]:
        raise unknown("engine", wrong[0], ENGINE_NAMES)
    if mode == "stream" and batch_size not in (None, 1):
        raise UserError(f"--batch-size is {batch_size}; expected 1 with --mode stream, which serves images one by one")
    if batch_size is not None and batch_size > _LARGEST_BATCH:
        raise UserError(f"--batch-size is {batch_size}; expected at most {_LARGEST_BATCH}")
    return MODES[mode] if batch_size is None else batch_size


def _measure(
    folders: Sequence[RunFolder],
    targets: Sequence[Target],
    policy: str | None,
    engines: Sequence[str],
    device: str,
    data_dir: str | None,
    settings: Mapping[str, Any],
) -> dict[RunFolder, dict[str, Any]]:
    import torch

    from exitkit.benchmarks.timing.stopwatch import time_all
    from exitkit.data.lazy import LazyData
    from exitkit.engine.devices import choose_device, process_settings
    from exitkit.engine.engine import Engine

    engine = Engine(choose_device(device))
    subjects = {folder: _subjects(folder, targets, policy, engines, data_dir, engine) for folder in folders}
    flat = [subject for group in subjects.values() for subject in group]
    boundary = cast("Boundary", settings["boundary"])
    if boundary == "end-to-end":  # the start of processes that read images would be timed
        for subject in flat:
            if isinstance(subject.data, LazyData):
                subject.data = replace(subject.data, workers=0)
    first, *others = subjects
    for folder in others:
        if not torch.equal(subjects[first][0].data.split.test, subjects[folder][0].data.split.test) or (
            first.recipe.dataset != folder.recipe.dataset
        ):
            raise UserError(f"{first.path} and {folder.path} have different test images; expected runs on one data set")
    with process_settings(engine.device, threads=settings["threads"]):
        time_all(flat, settings["batch_size"], settings["repeats"], boundary, settings["batches"])
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else None
    where = {"device": str(engine.device), "gpu": gpu, "torch": torch.__version__}
    measured = {}
    for folder, group in subjects.items():
        each = {subject.inference: _facts(subject, settings) for subject in group}
        measured[folder] = each[group[0].inference] | dict(settings) | where | {"engines": each}
    return measured


def _subjects(
    run: RunFolder,
    targets: Sequence[Target],
    policy: str | None,
    engines: Sequence[str],
    data_dir: str | None,
    engine: Any,
) -> list[Subject]:
    """Return what is measured of a run: one subject per inference engine."""
    from exitkit.benchmarks.timing.stopwatch import Subject
    from exitkit.inference.policy import ExitPolicy
    from exitkit.runs.job import load_network, load_run_data

    data = load_run_data(run, data_dir)
    network = load_network(run, data)
    engine.place(network)
    points = _points(run, targets, policy)
    changed = None
    if points and points[0].rule.reads_embeddings:  # all points have one combination
        changed, _ = points[0].rule.placed_in(network)
        points = [point._replace(rule=ExitPolicy(point.rule.rule)) for point in points]
    return [Subject(network, data, engine, points, name, changed) for name in dict.fromkeys(engines)]


def _points(run: RunFolder, targets: Sequence[Target], policy: str | None) -> list[Point]:
    """Return the operating points of a run, each with the first exit that is as accurate on validation."""
    import torch

    from exitkit.benchmarks.timing.stopwatch import Point

    stored = {name: torch.from_numpy(array) for name, array in run.outputs("validation").items()}
    exits = (stored["logits"].argmax(2) == stored["labels"][:, None]).double().mean(0)
    points = []
    for name, (rule, accuracy) in _rules(run, targets, policy).items():
        if accuracy is None:
            accuracy = float((rule.on_outputs(stored["logits"])[0].argmax(1) == stored["labels"]).double().mean())
        enough = [*(exits[:-1] >= accuracy - 1e-12).tolist(), True]
        points.append(Point(name, rule, enough.index(True) + 1))
    return points


def _targets(budgets: Sequence[str], given: Mapping[str, Any]) -> list[Target]:
    """Return the targets of the command line: each budget, and one other."""
    from exitkit.inference.targets import Target

    bounded = given["at_most"]
    targets = [Target.of(budget=budget, at_most=bounded) for budget in budgets]
    # The bound is of the budgets, and of a mean latency; without both, it is refused.
    targets.append(Target.of(**{**given, "at_most": bounded and not (budgets and given["latency"] is None)}))
    return [target for target in targets if target is not None]


def _rules(run: RunFolder, targets: Sequence[Target], policy: str | None) -> dict[str, tuple[ExitPolicy, float | None]]:
    """Return the policy of each operating point, by the name of the point, and its accuracy on validation.

    The accuracy, 0..1, is that of a `ChosenPolicy`; None: an exit rule, which is not fitted to labels.
    """
    from exitkit.inference.choose import policies_of_run, rule_for_target, rule_of_run
    from exitkit.inference.policy import ExitPolicy, read_policy

    if policy:
        if not targets:
            return {f"{policy}, no loss of accuracy": _measured(policies_of_run(run, policy, [None])[0])}
        certain = {target.certainty is not None for target in targets}
        if len(certain) > 1 and read_policy(policy).reads_embeddings:
            raise UserError(
                f"--policy {policy} changes the network, for --certainty by half of the validation images; expected "
                "targets with a certainty alone, or without"
            )
        units = dict.fromkeys(target.unit for target in targets)
        groups = [[target for target in targets if target.unit == unit] for unit in units]
        found = {
            target.words: _measured(chosen)
            for group in groups
            for target, chosen in zip(group, policies_of_run(run, policy, group), strict=True)
        }
        return {f"{policy}, {target.words}": found[target.words] for target in targets}
    rules = {target.words: rule_for_target(run, target) for target in targets} or {
        f"q = {share:g}": rule_of_run(run, share=share) for share in SHARES
    }
    return {name: (ExitPolicy(rule), None) for name, rule in rules.items()}


def _measured(chosen: ChosenPolicy) -> tuple[ExitPolicy, float]:
    return chosen.policy, chosen.validation["accuracy"] / 100


def _facts(subject: Subject, settings: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    from exitkit.benchmarks.timing.stopwatch import moved, static_names, summary

    size, repeats = settings["batch_size"], settings["repeats"]
    count = size * settings["batches"]

    def timing(name: str) -> dict[str, Any]:
        used = subject.joules.get(name)
        joules = None if used is None else used / (count * repeats)
        return {"name": name, **summary(subject.seconds[name], count), "joules_per_image": joules}

    exits = [summary(column, size) for column in np.transpose(subject.exits)]
    points = []
    for point in subject.points:
        forms = [timing(name) for name in static_names(point.matched)]
        static = min(forms, key=lambda form: form["mean"]) | {"exit": point.matched, "forms": forms}
        facts = timing(point.name) | {"rule": json.loads(point.rule.to_json()), "static": static}
        points.append(facts | moved(subject, point)._asdict())
    facts = {"milliseconds": [row["p50"] for row in exits], "exits": exits, "points": points}
    return facts | ({"stream": _stream(subject, points)} if settings["mode"] == "stream" else {})


def _stream(subject: Subject, points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the latency of all exits, of each operating point and of its static network, under load."""
    from exitkit.benchmarks.timing.arrivals import under_load
    from exitkit.benchmarks.timing.stopwatch import ALL_EXITS

    full = subject.seconds[ALL_EXITS]
    ways = {ALL_EXITS: full} | {point["name"]: subject.seconds[point["name"]] for point in points}
    for point in sorted(points, key=lambda point: point["static"]["exit"]):
        ways[f"static, exit {point['static']['exit']}"] = subject.seconds[point["static"]["name"]]
    return under_load(ways, full)


def _print(measured: Mapping[RunFolder, Mapping[str, Any]], batch_size: int, boundary: str) -> None:
    from rich.markup import escape

    from exitkit.cli.terminal import Console

    console = Console(highlight=False)
    for folder, facts in measured.items():
        for name, values in facts["engines"].items():
            console.print(f"\n{escape(folder.path.name)}", style="bold")
            console.print(f"milliseconds per image, batch size {batch_size}, {boundary}, engine {name}")
            console.print(_times(values))
            console.print("means of early exit and of the static network that is as accurate, in its two forms")
            console.print(_statics(values["points"]))
            for key in ("p50", "p99") if "stream" in values else ():
                console.print(f"{key} of latency in milliseconds, by the load: arrivals, in those that all exits serve")
                console.print(_loads(values["stream"], key))
            _print_moved(console, name, values["points"])
        if len(facts["engines"]) > 1:
            console.print("\nmean milliseconds per image on each engine")
            console.print(_side_by_side(facts["engines"]))
    if all(point["joules_per_image"] is None for facts in measured.values() for point in facts["points"]):
        console.print("energy: not available on this machine")


def _table(*columns: str) -> Table:
    """Return a table whose names wrap on a narrow screen, and whose numbers do not."""
    from rich.table import Table

    table = Table()
    table.add_column("", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _times(facts: Mapping[str, Any]) -> Table:
    from rich.markup import escape

    energy = any(point["joules_per_image"] is not None for point in facts["points"])
    keys = ("p50", "p95", "p99", "mean", "images_per_second", *(["joules_per_image"] if energy else []))
    heads = ("p50", "p95", "p99", "mean", "images/s", *(["J/image"] if energy else []))
    table = _table(*heads)
    for number, row in enumerate(facts["exits"], start=1):
        table.add_row(f"exit {number}", *(_number(row.get(key)) for key in keys))
    for point in facts["points"]:
        table.add_row(escape(point["name"]), *(_number(point[key]) for key in keys))
    return table


def _statics(points: Sequence[Mapping[str, Any]]) -> Table:
    """Return the comparison of each operating point with the static network that is as accurate on validation."""
    from rich.markup import escape

    table = _table("early exit", "static", "pruned", "stages", "time saved")
    for point in points:
        static = point["static"]
        forms = (_number(form["mean"]) for form in static["forms"])
        saved = f"{100 * (1 - point['mean'] / static['mean']):.0f} %"
        table.add_row(escape(point["name"]), _number(point["mean"]), f"exit {static['exit']}", *forms, saved)
    return table


def _loads(rows: Sequence[Mapping[str, Any]], key: str) -> Table:
    from rich.markup import escape

    table = _table(*(f"{row['load']:.0%}" for row in rows))
    for name in rows[0]["ways"]:
        table.add_row(escape(name), *(_number(row["ways"][name][key]) for row in rows))
    return table


def _side_by_side(engines: Mapping[str, Mapping[str, Any]]) -> Table:
    from rich.markup import escape

    table = _table(*engines)
    rows = {name: facts["exits"] + facts["points"] for name, facts in engines.items()}
    first = next(iter(rows.values()))
    for place, row in enumerate(first):
        name = escape(row.get("name", f"exit {place + 1}"))
        table.add_row(name, *(_number(values[place]["mean"]) for values in rows.values()))
    return table


def _print_moved(console: Console, engine: str, points: Sequence[Mapping[str, Any]]) -> None:
    if engine == "eager" or not points:
        return
    moved, images = sum(point["moved"] for point in points), sum(point["images"] for point in points)
    difference = max(point["difference"] for point in points)
    console.print(
        f"{engine}: {moved} of {counted(images, 'exit')} differ from those of eager; "
        f"logits differ by at most {difference:.1g} of the largest"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _write(run: RunFolder, facts: dict[str, Any]) -> None:
    from exitkit.files import write_json
    from exitkit.runs.folder import LATENCY

    write_json(run.path / LATENCY, facts)
