"""`exitkit watch`: show the runs of a folder while any process, on any machine, trains them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import folders, one_of
from exitkit.cli.interrupts import interruptible
from exitkit.cli.options import FiniteFloat, some_of
from exitkit.errors import Interrupted, UserError
from exitkit.escaping import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from exitkit.benchmarks.campaign.watching import Watched
    from exitkit.cli.terminal import Console

_STYLES = {
    "running": "bold cyan",
    "stalled": "bold yellow",
    "failed": "bold red",
    "waiting": "dim",
    "finished": "green",
}


@click.command(short_help="Watch the runs of a folder while they train.")
@click.argument("folder", metavar="FOLDER", default="runs", shell_complete=folders)
@click.option("--once", is_flag=True, help="Print the table once and exit.")
@click.option(
    "--interval", type=FiniteFloat(0.1, 86400), default=2.0, show_default=True, help="Seconds between updates."
)
@click.option(
    "--state",
    "states",
    metavar="A,B,...",
    shell_complete=one_of(*_STYLES),
    help="Show only runs in these states: running, stalled, failed, waiting, finished.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON once and exit.")
def watch(folder: str, once: bool, interval: float, states: str | None, as_json: bool) -> None:
    """Show the runs of FOLDER while they train.

    The table has the state, the epoch, the loss and accuracy of the first and the last exit, and the time left. The
    command only reads the run folders, so it works on any machine that can access them, for any number of `train` and
    `compare` processes. Accuracy is on validation, and on test for finished runs. A run is "stalled" if its process
    has ended, or has not reported progress for a long time. The command exits when all runs are finished or failed, or
    on Ctrl-C; training continues. The last line sums up all runs, also those that --state leaves out.

    \b
    Examples:
      exitkit watch
      exitkit watch study --once
      exitkit watch study --state failed,running
      exitkit watch study --json
    """
    from exitkit.benchmarks.campaign.watching import STATES, look
    from exitkit.cli.terminal import Console

    shown = STATES if states is None else some_of("--state", "state", states, STATES)
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{folder} {'is a file' if path.exists() else 'does not exist'}; expected a folder of runs")
    if (path / "recipe.json").exists():
        raise UserError(f"{folder} is a run; expected the folder that it is in: exitkit watch {path.resolve().parent}")
    console = Console(highlight=False)
    if as_json:
        click.echo(json.dumps(_facts(path, look(path), shown), indent=2))
    elif once:
        console.print(_view(path, look(path), None, shown))
    else:
        try:
            with interruptible():
                (_live if console.is_terminal else _lines)(console, path, interval, shown)
        except KeyboardInterrupt:
            raise Interrupted("stopped watching; training continues") from None


def _live(console: Console, folder: Path, interval: float, shown: Sequence[str]) -> None:
    """Show a live table of the folder's runs until all have ended."""
    from rich.live import Live

    from exitkit.benchmarks.campaign.watching import look

    with Live(console=console, auto_refresh=False) as live:
        while True:
            runs = look(folder)
            live.update(_view(folder, runs, max(console.height - 4, 3), shown), refresh=True)
            if _all_ended(runs):
                return
            time.sleep(interval)


def _lines(console: Console, folder: Path, interval: float, shown: Sequence[str]) -> None:
    """Print a line whenever the state or epoch of a run changes, until all have ended."""
    from exitkit.benchmarks.campaign.watching import labels, look

    printed: dict[str, str] = {}
    while True:
        runs = look(folder)
        for run, label in zip(runs, labels(runs), strict=True):
            loss, accuracy = _first_and_last(run)
            line = f"{label}: {_state_words(run)}"
            line += f", loss {loss}, accuracy {accuracy} %" if accuracy else ""
            key = f"{run.state} {run.epoch} {run.phase}"
            if run.state in shown and printed.get(run.run) != key:
                printed[run.run] = key
                console.print(f"{time.strftime('%H:%M:%S')}  {line}", soft_wrap=True, markup=False)
        if _all_ended(runs):
            console.print(_summary(runs), soft_wrap=True, markup=False)
            return
        time.sleep(interval)


def _all_ended(runs: Sequence[Watched]) -> bool:
    return bool(runs) and all(run.state in ("finished", "failed") for run in runs)


def _facts(folder: Path, runs: Sequence[Watched], shown: Sequence[str]) -> dict[str, Any]:
    from exitkit.benchmarks.campaign.watching import STATES, labels, seconds_left

    counts = Counter(run.state for run in runs)
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        if run.state not in shown:
            continue
        names = {key: run.recipe.get(key) for key in ("method", "backbone", "dataset", "seed")}
        fields = {key: value for key, value in asdict(run).items() if key != "recipe"}
        rows.append({"label": label, **names, **fields})
    states = {state: counts[state] for state in STATES}
    return {"folder": str(folder), "states": states, "seconds_left": seconds_left(runs), "runs": rows}


def _view(folder: Path, runs: Sequence[Watched], height: int | None, states: Sequence[str] = ()) -> RenderableType:
    """Return the table of the runs in some states (none given: in any), and a line that sums up all runs.

    The table has at most `height` rows, sorted by state; None: all of them, unsorted.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from exitkit.benchmarks.campaign.watching import STATES, labels

    if not runs:
        return Text(f"no runs in {folder} yet")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("run", overflow="ellipsis", no_wrap=True, ratio=None)
    table.add_column("state", no_wrap=True, min_width=8)
    table.add_column("epoch", justify="right", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("accuracy %", justify="right", no_wrap=True)
    table.add_column("left", justify="right", no_wrap=True)
    order: Callable[[tuple[Watched, str]], int] = lambda pair: STATES.index(pair[0].state)  # noqa: E731
    rows = [pair for pair in zip(runs, labels(runs), strict=True) if pair[0].state in (states or STATES)]
    rows = sorted(rows, key=order) if height else rows
    shown = rows if height is None or len(rows) <= height else rows[: height - 1]
    notes: dict[str, list[str]] = {}
    for run, label in shown:
        loss, accuracy = _first_and_last(run)
        left = _duration(run.seconds_left) if run.seconds_left is not None else ""
        state = Text("evaluating" if _evaluates(run) else run.state, style=_STYLES[run.state])
        table.add_row(Text(label), state, Text(_epoch(run)), loss, accuracy, left)
        if run.note:
            notes.setdefault(run.note, []).append(label)
    reasons = [Text(f"{', '.join(names)}: {note}", style="dim") for note, names in notes.items()]
    more = [Text(f"and {len(rows) - len(shown)} more", style="dim")] if len(shown) < len(rows) else []
    return Group(table, *more, *reasons, Text(_summary(runs)))


def _summary(runs: Sequence[Watched]) -> str:
    from exitkit.benchmarks.campaign.watching import STATES, seconds_left

    counts = Counter(run.state for run in runs)
    words = [f"{counts[state]} {state}" for state in reversed(STATES) if counts[state]]
    left = seconds_left(runs)
    return f"{counted(len(runs), 'run')}: {', '.join(words)}" + (
        f"; about {_duration(left)} left" if left is not None else ""
    )


def _state_words(run: Watched) -> str:
    reason = f" ({run.note})" if run.note else ""
    where = f", epoch {_epoch(run)}" if run.state == "running" and run.epoch else ""
    return f"{run.state}{where}{reason}"


def _evaluates(run: Watched) -> bool:
    return run.state == "running" and run.fraction >= 1


def _epoch(run: Watched) -> str:
    if not run.epochs or run.state == "waiting":
        return ""
    phase = f"{run.phase} " if run.phase not in ("", "train", "None") else ""
    return f"{phase}{run.epoch}/{run.epochs}"


def _first_and_last(run: Watched) -> tuple[str, str]:
    """Return the loss, and the accuracy in percent, of the first and the last exit as text."""
    accuracies = run.test_accuracies or run.validation_accuracies
    loss = f"{run.train_losses[0]:.2f} {run.train_losses[-1]:.2f}" if run.train_losses else ""
    return loss, f"{accuracies[0]:.1f} {accuracies[-1]:.1f}" if accuracies else ""


def _duration(seconds: float) -> str:
    from exitkit.benchmarks.campaign.estimate import in_words

    return in_words(seconds)
