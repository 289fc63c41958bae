"""`exitkit policies`: exit policies compared on the stored outputs of finished runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import runs as complete_runs
from exitkit.cli.options import json_option, only_runs
from exitkit.errors import UserError, unknown
from exitkit.escaping import counted, in_csv

if TYPE_CHECKING:
    import pandas as pd

    from exitkit.inference.policy import PolicyName
    from exitkit.runs.folder import RunFolder

COSTS = ("macs", "latency")
COMBINATION_HELP = "Combination of exits, such as mie; repeatable."
SHOWN = 12
"""Policies in the printed table."""


@click.command("policies", short_help="Compare exit policies on finished runs.")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, shell_complete=complete_runs)
@click.option("--combination", "combinations", metavar="NAME", multiple=True, help=COMBINATION_HELP)
@click.option("--score", "scores", metavar="NAME", multiple=True, help="Score, such as margin; repeatable.")
@click.option("--rule", "rules", metavar="NAME", multiple=True, help="Rule, such as stopping; repeatable.")
@click.option("--policy", "names", metavar="NAME", multiple=True, help="A whole policy: mie+stopping; repeatable.")
@click.option("--full", is_flag=True, help="All policies, not only those that change one part of the baseline.")
@click.option("--budget", "budgets", metavar="AMOUNT", multiple=True, help="Average budget, such as 40M; repeatable.")
@click.option("--cost", metavar="NAME", default="macs", show_default=True, help="macs, or latency (after `bench`).")
@click.option("--all", "everything", is_flag=True, help=f"Print all policies, not the best {SHOWN}.")
@click.option("--out", metavar="DIR", help="Output folder.  [default: RUN/policies, or policies for several runs]")
@json_option("a list with one row per policy and budget, for each group of runs")
def policies_command(
    runs: tuple[str, ...],
    combinations: tuple[str, ...],
    scores: tuple[str, ...],
    rules: tuple[str, ...],
    names: tuple[str, ...],
    full: bool,
    budgets: tuple[str, ...],
    cost: str,
    everything: bool,
    out: str | None,
    as_json: bool,
) -> None:
    """Compare exit policies on the stored outputs of finished runs; nothing is trained.

    A policy is a combination of exits (`plain`: none), a score and a rule. Each is fitted on validation outputs and
    compared, at each budget and on the same test images, with plain confidence and the papers' exit shares. By default
    one part of this baseline is replaced at a time; laplace and mie-laplace belong to it after `exitkit evaluate RUN
    --embeddings`. `exitkit export` and `bench` take a policy by the name that is
    printed. Runs that differ only in the seed are averaged. Written: policies.csv, curves.csv, policies.html,
    policies.png and .pdf.

    \b
    Examples:
      exitkit policies runs/joint-*
      exitkit policies RUN --rule shares --rule stopping --all
      exitkit policies RUN --combination mie --budget 40M --json
      exitkit policies RUN --policy mie+stopping --policy agreement:weights=linear
    """
    from exitkit.benchmarks.campaign.record import BESIDE
    from exitkit.cli.progress import working
    from exitkit.runs.folder import RunFolder

    if cost not in COSTS:
        raise unknown("cost", cost, COSTS)
    folders = [RunFolder(name) for name in only_runs(list(dict.fromkeys(runs)), BESIDE)]
    for folder in folders:
        folder.results()  # raises for an unfinished run
    from exitkit.benchmarks.report.policies import policies

    embedded = all(folder.has_embeddings() for folder in folders)
    chosen = policies(combinations, scores, rules, names=names, full=full, embeddings=embedded)
    with working("comparing exit policies") as report:
        groups = _compare(folders, chosen, _amounts(budgets, cost), cost, report)
    target = Path(out) if out else folders[0].path / "policies" if len(folders) == 1 else Path("policies")
    _write(groups, folders, target, cost)
    if as_json:
        rows = {title: json.loads(frame.to_json(orient="records")) for title, (frame, _) in groups.items()}
        click.echo(json.dumps(rows, indent=2))
        return
    _print(groups, None if everything else SHOWN, cost)
    click.echo(f"wrote policies (.csv, .html, .png, .pdf) and curves.csv to {target}")


def _amounts(budgets: Sequence[str], cost: str) -> list[float]:
    from exitkit.inference.budgets import read_budget

    for text in budgets:
        if text.endswith("ms") != (cost == "latency"):
            expected = "milliseconds, such as 1.5ms" if cost == "latency" else "multiply-adds, such as 40M"
            raise UserError(f"--budget is {text} and the cost is {cost}; expected {expected}")
    return sorted(set(map(read_budget, budgets)))


Groups = dict[str, "tuple[pd.DataFrame, pd.DataFrame]"]
"""{title: (comparison, curves)} of the runs that differ only in the seed."""


def _compare(
    folders: Sequence[RunFolder],
    chosen: Sequence[PolicyName],
    budgets: Sequence[float],
    cost: str,
    report: Callable[[float], None],
) -> Groups:
    import numpy as np

    from exitkit.benchmarks.report.collect import check_latencies
    from exitkit.benchmarks.report.labels import name_runs
    from exitkit.benchmarks.report.policies import (
        Outputs,
        check_same_images,
        comparison,
        curves,
        default_budgets,
        measure,
    )
    from exitkit.inference.budgets import exit_costs

    names = name_runs([folder.identity for folder in folders])
    grouped: dict[str, list[RunFolder]] = {}
    for folder, (method, backbone, dataset) in zip(folders, names, strict=True):
        grouped.setdefault(f"{method} on {backbone}, {dataset}", []).append(folder)
    result: Groups = {}
    done = 0
    for title, members in grouped.items():
        if cost == "latency":
            check_latencies(members)
        stored = [Outputs.of_run(folder, exit_costs(folder, cost).astype(float), chosen) for folder in members]
        check_same_images(stored)
        costs = np.mean([outputs.costs for outputs in stored], axis=0)
        amounts = np.array(budgets) if budgets else default_budgets(costs)
        if amounts[0] < costs[0]:
            raise UserError(
                f"budget {amounts[0]:.6g} is below the cost of the first exit of {title}; "
                f"expected at least {costs[0]:.6g}"
            )
        seeds = []
        for outputs in stored:
            seeds.append(measure(outputs, chosen, partial(_report, report, done, len(folders))))
            done += 1
        result[title] = comparison(seeds, amounts), curves(seeds)
    return result


def _report(report: Callable[[float], None], done: int, runs: int, share: float) -> None:
    report((done + share) / runs)


def _print(groups: Mapping[str, tuple[Any, Any]], most: int | None, cost: str) -> None:
    from rich.text import Text

    from exitkit.benchmarks.report.policy_tables import print_table
    from exitkit.cli.terminal import Console

    console = Console(highlight=False)
    for title, (frame, _) in groups.items():
        console.print(Text.assemble("\n ", ("Accuracy within budgets (%)", "bold"), f"  {title}"))
        print_table(frame, console, most, cost)


def _write(groups: Groups, folders: Sequence[RunFolder], folder: Path, cost: str) -> None:
    import pandas as pd

    from exitkit.benchmarks.report.drawing import save_figure
    from exitkit.benchmarks.report.policy_tables import curves_figure, html
    from exitkit.files import write_files

    tables = {
        name: pd.concat([pair[index].assign(runs=title) for title, pair in groups.items()])
        for index, name in enumerate(("policies", "curves"))
    }
    lead = [f"{counted(len(folders), 'run')}, compared without training on their stored outputs."]
    text = html([(title, *pair) for title, pair in groups.items()], lead, cost)
    writers: dict[str, Callable[[Path], object]] = {
        f"{name}.csv": partial(in_csv(frame).to_csv, index=False) for name, frame in tables.items()
    }
    writers["policies.html"] = partial(Path.write_text, data=text, encoding="utf-8")
    for number, (_, curves) in enumerate(groups.values(), start=1):
        figure = curves_figure(curves, cost)
        suffix = f"-{number}" if len(groups) > 1 else ""
        for kind in ("png", "pdf"):
            writers[f"policies{suffix}.{kind}"] = partial(save_figure, figure, kind=kind)
    write_files(folder, writers)
