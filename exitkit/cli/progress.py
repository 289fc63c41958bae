"""A run's progress: a live bar on a terminal, a line now and then elsewhere, nothing on ranks but the first."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from exitkit.feed import Progress as TrainingProgress

_LINE_INTERVAL = 5.0  # seconds between lines where there is no terminal


def describe(progress: TrainingProgress) -> str:
    """Write where a run is: epoch and step rate."""
    return f"{progress.phase}: epoch {progress.epoch}/{progress.epochs}, {progress.rate:.1f} steps/s"


def describe_exits(progress: TrainingProgress) -> list[str]:
    """Write each exit's training loss, and each exit's training accuracy."""
    losses = " ".join(f"{value:5.2f}" for value in progress.losses)
    accuracies = " ".join(f"{100 * value:5.1f}" for value in progress.accuracies)
    return [f"loss  {losses}", f"acc % {accuracies}"]


class TrainProgress:
    """Shows the progress of one run; call it with each report."""

    def __init__(self) -> None:
        self.speaks = int(os.environ.get("RANK", "0")) == 0
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

    def _print_line(self, progress: TrainingProgress) -> None:
        now = time.monotonic()
        if now >= self._next_line or progress.fraction >= 1:
            self._next_line = now + _LINE_INTERVAL
            self._console.print("  ".join([describe(progress), *describe_exits(progress)]), soft_wrap=True)
