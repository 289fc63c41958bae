"""`exitkit train`: trains one run and shows its progress."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

import click

from exitkit.cli.completion import names
from exitkit.cli.interrupts import interruptible, speaks_for_all
from exitkit.cli.options import COMPARISON_KEYS, make_recipe, parse_sets, read_recipe, recipe_options
from exitkit.errors import Interrupted, UserError


@click.command(short_help="Train and evaluate one run.")
@click.option(
    "--method",
    metavar="NAME",
    shell_complete=names("methods"),
    help="Training method, or a composition a+b.  [default: joint]",
)
@click.option("--seed", type=int, help="Seed of weights, data order and augmentation.  [default: 0]")
@click.option("--resume", is_flag=True, help="Resume the run if it was interrupted.")
@recipe_options
def train(sets: tuple[str, ...], recipe_file: str | None, out: str, resume: bool, **given: Any) -> None:
    """Train and evaluate one run, and write its run folder.

    \b
    Examples:
      exitkit train --method boostnet
      exitkit train --method boostnet --set temperature=0.8 --epochs 10 --seed 3
      exitkit train --method ge --dataset cifar100 --data-dir data --device cuda
      torchrun --nproc-per-node 2 -m exitkit train --method metagf
    """
    values = read_recipe(recipe_file)
    if set(values) & set(COMPARISON_KEYS):
        raise UserError(
            f"recipe {recipe_file} is for a comparison; use it with: exitkit compare --recipe {recipe_file}"
        )
    recipe = make_recipe(values, given).with_settings(parse_sets(sets))

    from exitkit.cli.progress import TrainProgress, loading

    with loading("torch"):
        import torch._dynamo  # noqa: F401  the first optimiser imports it, which may take seconds
    from exitkit.training.loop import train as train_run

    try:
        with interruptible(), TrainProgress() as progress:
            run = train_run(recipe, out, resume=resume, report=progress, announce=progress.announce)
    except KeyboardInterrupt:
        if not speaks_for_all():
            sys.exit(130)
        words = shlex.join([word for word in sys.argv[1:] if word != "--resume"])
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        start = "torchrun ... -m exitkit" if several else "exitkit"
        raise Interrupted(f"stopped; resume with: {start} {words} --resume") from None
    if progress.speaks:
        from exitkit.cli.show import print_run

        print_run(run, pictures=False)
        click.echo(f"run folder: {run.path}")
