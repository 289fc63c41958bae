"""`python -m exitkit.benchmarks.speed.stages`: where time goes stage by stage, and what early exit can save of it."""

from __future__ import annotations

import time
from typing import NamedTuple

import click
import numpy as np
import torch

from exitkit.benchmarks.speed.inference import halved
from exitkit.benchmarks.speed.work import Work
from exitkit.cli import main
from exitkit.errors import UserError
from exitkit.inference.thresholds import exit_counts
from exitkit.networks.cascade import map_tensors


class Shares(NamedTuple):
    """Stage by stage [K]: shares of multiply-adds and of time, of images that reach it, and of its time for those."""

    operations: np.ndarray
    time: np.ndarray
    reach: np.ndarray
    left: np.ndarray

    @property
    def best(self) -> float:
        """Time saved per multiply-adds saved if a stage's time fell in proportion to its images."""
        return float((1 - self.reach @ self.time) / (1 - self.reach @ self.operations))

    @property
    def found(self) -> float:
        """The same with the time that each stage really takes for those who reach it."""
        return float((1 - self.left @ self.time) / (1 - self.reach @ self.operations))


@torch.inference_mode()
def stage_shares(work: Work) -> Shares:
    """Time each stage with its head on the whole batch, and on those who reach it where half of all work is saved."""
    network, images = work.build().eval(), work.data()[0]
    macs, q = halved(network)
    counts = exit_counts(len(images), len(macs), [q])[0]
    if not counts.any():
        raise UserError(f"of {len(images)} images none leaves early; expected a larger batch")
    reach = len(images) - np.concatenate([[0], np.cumsum(counts)])[: len(macs)]
    seconds = np.empty((work.rounds, 2, len(macs)))
    for taken in seconds:
        whole = (images, None)
        for index, count in enumerate(reach):
            few = map_tensors(lambda tensor, rows=int(count): tensor[:rows].contiguous(), whole)
            for which, (state, carry) in enumerate((few, whole)):
                began = time.perf_counter()
                _, *after = network.step(index, state, carry)
                taken[which, index] = time.perf_counter() - began
            whole = tuple(after)
    few_seconds, all_seconds = np.median(seconds, axis=0)
    operations = np.diff(macs, prepend=0) / macs[-1]
    return Shares(operations, all_seconds / all_seconds.sum(), reach / len(images), few_seconds / all_seconds)


@click.command()
@click.option("--network", metavar="NAME", default="msdnet-cifar-lg5", show_default=True, help="What is run.")
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Images at once.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="How often the clock is read.")
def stages(network: str, batch: int, rounds: int) -> None:
    """Show each stage's share of multiply-adds and time, and what early exit can make of it."""
    torch.set_num_threads(1)
    shares = stage_shares(Work(network, batch, rounds=rounds))
    click.echo("| stage | multiply-adds | time | images that reach it | its time for those |\n|---|--:|--:|--:|--:|")
    for index, row in enumerate(zip(*shares, strict=True), 1):
        click.echo(f"| {index} | " + " | ".join(f"{100 * share:.0f} %" for share in row) + " |")
    click.echo(f"\ntime saved per multiply-adds saved: {shares.found:.2f}; {shares.best:.2f} if time went by images")


if __name__ == "__main__":
    main(command=stages)
