"""`python -m exitkit.benchmarks.speed.stages`: time per stage, and the time that early exit can save."""

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
    """Per stage [K]: fractions of multiply-adds, of time, of images that reach it, and of its time for those images."""

    operations: np.ndarray
    time: np.ndarray
    reach: np.ndarray
    reach_time: np.ndarray

    @property
    def best(self) -> float:
        """Time saved / multiply-adds saved if the time of a stage were proportional to its number of images."""
        return float((1 - self.reach @ self.time) / (1 - self.reach @ self.operations))

    @property
    def measured(self) -> float:
        """Time saved / multiply-adds saved with the measured time of each stage for the images that reach it."""
        return float((1 - self.reach_time @ self.time) / (1 - self.reach @ self.operations))


@torch.inference_mode()
def stage_shares(work: Work) -> Shares:
    """Measure each stage with its head, on all images and on those that reach it if half of the work is saved."""
    network, images = work.build().eval(), work.data()[0]
    macs, q = halved(network)
    counts = exit_counts(len(images), len(macs), [q])[0]
    if not counts.any():
        raise UserError(f"none of {len(images)} images leaves early; expected a larger batch")
    reach = len(images) - np.concatenate([[0], np.cumsum(counts)])[: len(macs)]
    seconds = np.empty((work.rounds, 2, len(macs)))
    for measured in seconds:
        whole = (images, None)
        for index, count in enumerate(reach):
            few = map_tensors(lambda tensor, rows=int(count): tensor[:rows].contiguous(), whole)
            for which, (state, carry) in enumerate((few, whole)):
                began = time.perf_counter()
                _, *after = network.step(index, state, carry)
                measured[which, index] = time.perf_counter() - began
            whole = tuple(after)
    few_seconds, all_seconds = np.median(seconds, axis=0)
    operations = np.diff(macs, prepend=0) / macs[-1]
    return Shares(operations, all_seconds / all_seconds.sum(), reach / len(images), few_seconds / all_seconds)


@click.command()
@click.option("--network", metavar="NAME", default="msdnet-cifar-lg5", show_default=True, help="Backbone.")
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Batch size.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Measurements per stage.")
def stages(network: str, batch: int, rounds: int) -> None:
    """Print the fraction of multiply-adds and time per stage, and the time that early exit saves."""
    torch.set_num_threads(1)
    shares = stage_shares(Work(network, batch, rounds=rounds))
    click.echo("| stage | multiply-adds | time | images that reach it | its time for these images |")
    click.echo("|---|--:|--:|--:|--:|")
    for index, row in enumerate(zip(*shares, strict=True), 1):
        click.echo(f"| {index} | " + " | ".join(f"{100 * share:.0f} %" for share in row) + " |")
    click.echo(
        f"\ntime saved per multiply-adds saved: {shares.measured:.2f}; {shares.best:.2f} if proportional to images"
    )


if __name__ == "__main__":
    main(command=stages)
