"""`python -m exitkit.benchmarks.speed`: measure all speed targets, as ratios, in one process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable

import click
import torch

from exitkit.benchmarks.speed.evaluation import command_rows, evaluation_row, policies_row
from exitkit.benchmarks.speed.gpu import gpu_rows
from exitkit.benchmarks.speed.heads import heads_row
from exitkit.benchmarks.speed.inference import engine_rows, inference_rows
from exitkit.benchmarks.speed.loading import loading_share
from exitkit.benchmarks.speed.memory import l2w_memory_row
from exitkit.benchmarks.speed.roofline import Roofline, rooflines
from exitkit.benchmarks.speed.row import Profile, Row
from exitkit.benchmarks.speed.scaling import scaling_row
from exitkit.benchmarks.speed.table import print_facts, print_profiles, print_rooflines, print_rows, print_speedups
from exitkit.benchmarks.speed.training import (
    Measured,
    Speedup,
    l2w_rows,
    metagf_rows,
    plain_rows,
    step_rows,
)
from exitkit.benchmarks.speed.work import Work
from exitkit.cli import main
from exitkit.cli.options import some_of
from exitkit.errors import UserError

Result = Row | Measured | Speedup | Profile | Roofline

PARTS: dict[str, Callable[[Work], Iterable[Result]]] = {
    "steps": step_rows,
    "plain": plain_rows,
    "roofline": rooflines,
    "l2w": l2w_rows,
    "metagf": metagf_rows,
    "heads": lambda work: [heads_row()],
    "memory": lambda work: [l2w_memory_row(work)],
    "scaling": lambda work: [scaling_row(work)],
    "inference": inference_rows,
    "engines": engine_rows,
    "evaluation": lambda work: [evaluation_row(work.rounds)],
    "policies": lambda work: [policies_row()],
    "start-up": lambda work: command_rows(work.rounds),
    "gpu": gpu_rows,
}


@click.command()
@click.option("--only", metavar="A,B,...", help=f"Parts: {', '.join(PARTS)}.  [default: all, about half an hour]")
@click.option("--rounds", default=7, show_default=True, help="Measurements per ratio, except of heads.")
@click.option("--network", metavar="NAME", default="msdnet-cifar-lg5", show_default=True, help="Backbone.")
@click.option("--batch", default=128, show_default=True, help="Images per training step.")
@click.option("--json", "as_json", is_flag=True, help="Print only the targets, as JSON.")
def speed(only: str | None, rounds: int, network: str, batch: int, as_json: bool) -> None:
    """Measure the speed targets and print which of them are met.

    \b
    Examples:
      python -m exitkit.benchmarks.speed
      python -m exitkit.benchmarks.speed --only steps,l2w --rounds 15
      python -m exitkit.benchmarks.speed --json > speed.json
    """
    parts = list(PARTS) if only is None else some_of("--only", "part", only, PARTS)
    for name, value, least in (("--rounds", rounds, 1), ("--batch", batch, 8)):
        if value < least:
            raise UserError(f"{name} is {value}; expected at least {least}")
    torch.set_num_threads(1)
    work = Work(network, batch, rounds=rounds)
    results: list[Result] = []
    began = time.perf_counter()
    for part in parts:
        for result in PARTS[part](work):
            line = f"{result.target}: {result.verdict}" if isinstance(result, Row) else f"{part}: {result[0]}"
            click.echo(f"{time.perf_counter() - began:6.0f} s  {line}", err=True)
            results.append(result)
    rows = [result for result in results if isinstance(result, Row)]
    if as_json:
        click.echo(json.dumps([row._asdict() for row in rows], indent=1))
        return
    if facts := [result for result in results if isinstance(result, Measured)]:
        share = 100 * loading_share(work)
        print_facts(
            facts, f"{network}, {batch} images per step, one thread; loading takes {share:.1f} % of joint training"
        )
    if speedups := [result for result in results if isinstance(result, Speedup)]:
        print_speedups(speedups)
    if limits := [result for result in results if isinstance(result, Roofline)]:
        print_rooflines(limits)
    print_rows(rows)
    print_profiles([result for result in results if isinstance(result, Profile)])


if __name__ == "__main__":
    main(command=speed)
