"""`exitkit bench`: how long each exit of a trained network takes to answer, measured stage by stage."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import runs as complete_runs
from exitkit.cli.interrupts import interruptible
from exitkit.cli.options import device_option
from exitkit.errors import Interrupted, UserError

if TYPE_CHECKING:
    from exitkit.runs import RunFolder


@click.command(short_help="Measure how long each exit takes to answer.")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, shell_complete=complete_runs)
@click.option("--batch-size", type=int, default=1, show_default=True, help="Images at once.")
@click.option("--repeats", type=int, default=50, show_default=True, help="How often; the median counts.")
@click.option("--threads", type=int, default=1, show_default=True, help="CPU threads.")
@device_option("[default: auto]", default="auto")
def bench(runs: tuple[str, ...], batch_size: int, repeats: int, threads: int, device: str) -> None:
    """Measure the milliseconds an image until each exit answers, on test images, and keep them in the run folder.

    The network runs exit by exit, as it does when images leave early, and the clock is read at each answer; the median
    over all repeats counts. Then `exitkit report --cost latency` has milliseconds on its axes. Runs that are to be
    compared have to be measured on one machine, with nothing else going on.

    \b
    Examples:
      exitkit bench runs/*
      exitkit bench runs/boostnet-msdnet-tiny-digits-s0-1a2b3c4d --batch-size 64
    """
    from rich.console import Console
    from rich.table import Table

    from exitkit.runs import RunFolder

    for name, value in (("--batch-size", batch_size), ("--repeats", repeats), ("--threads", threads)):
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")
    folders = [RunFolder(name) for name in runs]
    for folder in folders:
        folder.results()  # says how to go on with one that is not finished
    table = Table(title=f"milliseconds an image, {batch_size} at once")
    table.add_column("run")
    try:
        with interruptible():
            found = {folder: _measure(folder, batch_size, repeats, threads, device) for folder in folders}
    except KeyboardInterrupt:
        raise Interrupted("stopped; nothing was written") from None
    for number in range(1, max(map(len, found.values())) + 1):
        table.add_column(f"exit {number}", justify="right")
    for folder, facts in found.items():
        _write(folder, facts)
        table.add_row(folder.path.name, *(f"{value:.3g}" for value in facts["milliseconds"]))
    Console().print(table)


def _measure(run: RunFolder, batch_size: int, repeats: int, threads: int, device: str) -> dict[str, Any]:
    import torch

    from exitkit.engine import Engine, choose_device
    from exitkit.exit_outputs import load_data, load_network

    engine = Engine(choose_device(device))
    data = load_data(run.recipe, run.path / "split.safetensors")
    network = load_network(run, data)
    engine.place(network)
    count = len(data.labels("test"))
    positions = [torch.arange(batch_size) % count for _ in range(1)]
    (batch,) = data.batches("test", positions, augment=False, seed=0)
    images = engine.images(batch.images)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times = []
        with torch.inference_mode():
            for _ in range(repeats + 3):
                began, answers = time.perf_counter(), []
                for _ in network.iterate(images):
                    if engine.device.type == "cuda":
                        torch.cuda.synchronize()
                    answers.append(1000 * (time.perf_counter() - began) / batch_size)
                times.append(answers)
    finally:
        torch.set_num_threads(before)
    medians = [statistics.median(column) for column in zip(*times[3:], strict=True)]  # the first are warm-up
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else None
    facts = {"milliseconds": medians, "batch_size": batch_size, "repeats": repeats, "threads": threads}
    return facts | {"device": str(engine.device), "gpu": gpu, "torch": torch.__version__}


def _write(run: RunFolder, facts: dict[str, Any]) -> None:
    from exitkit.files import write_json
    from exitkit.runs import LATENCY

    write_json(run.path / LATENCY, facts)
