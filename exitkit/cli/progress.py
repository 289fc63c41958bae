"""Progress reporting: live on a terminal, otherwise a line every few seconds; only the first rank prints."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from exitkit.cli.interrupts import interruptible, speaks_for_all
from exitkit.cli.terminal import Console

if TYPE_CHECKING:
    from exitkit.training.progress import Progress as TrainingProgress

_LINE_INTERVAL = 5.0  # seconds between lines without a terminal


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Print on a terminal that `what` is being loaded, during the block; Ctrl-C may end the process at once."""
    shown = sys.stderr.isatty() and speaks_for_all()
    if shown:  # plain text: a hidden cursor could not be restored after Ctrl-C
        sys.stderr.write(f"loading {what} ...")
        sys.stderr.flush()
    try:
        yield
    finally:
        if shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


@contextlib.contextmanager
def working(description: str) -> Iterator[Callable[[float], None]]:
    """Show a progress bar; yield a function that sets the completed share, 0..1, if it is known."""
    console = Console(stderr=True, highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn())
    bar = Progress(
        *columns,
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(description, total=None)
    next_line = time.monotonic() + _LINE_INTERVAL

    def report(share: float) -> None:
        nonlocal next_line
        bar.update(task, total=1.0, completed=share)
        if not console.is_terminal and time.monotonic() >= next_line:
            next_line = time.monotonic() + _LINE_INTERVAL
            console.print(f"{description}: {share:.0%}", soft_wrap=True)

    with interruptible(), bar:
        yield report


def describe(progress: TrainingProgress) -> str:
    """Return the phase, epoch and step rate of a run as text."""
    return f"{progress.phase}: epoch {progress.epoch}/{progress.epochs}, {progress.rate:.1f} steps/s"


def describe_exits(progress: TrainingProgress) -> list[str]:
    """Return two lines: the training loss per exit, and the training accuracy in % per exit."""
    losses = " ".join(f"{value:5.2f}" for value in progress.losses)
    accuracies = " ".join(f"{100 * value:5.1f}" for value in progress.accuracies)
    return [f"loss  {losses}", f"acc % {accuracies}"]


class TrainProgress:
    """Shows the progress of one run; it is called with each progress report."""

    def __init__(self) -> None:
        self.speaks = speaks_for_all()
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
        )
        self._task = self._bar.add_task("starting", total=1.0)
        self._exits = Text()
        self._live = Live(Group(self._bar, self._exits), console=self._console, transient=True)
        self._is_live = self.speaks and self._console.is_terminal
        self._next_line = 0.0

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, progress: TrainingProgress) -> None:
        """Show one report."""
        if self._is_live:
            self._bar.update(self._task, completed=progress.fraction, description=describe(progress))
            self._exits.plain = "\n".join(describe_exits(progress))
        elif self.speaks and progress.epoch_done:
            self._print_line(progress)

    def announce(self, lines: Sequence[str]) -> None:
        """Print the lines that describe the images, before training."""
        for line in lines if self.speaks else ():
            self._console.print(line, markup=False)

    def _print_line(self, progress: TrainingProgress) -> None:
        now = time.monotonic()
        if now >= self._next_line or progress.fraction >= 1:
            self._next_line = now + _LINE_INTERVAL
            self._console.print("  ".join([describe(progress), *describe_exits(progress)]), soft_wrap=True)
