"""A run's progress: a live bar on a terminal, a line now and then elsewhere, nothing on ranks but the first."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from exitkit.feed import Progress as TrainingProgress

_LINE_INTERVAL = 5.0  # seconds between lines where there is no terminal


def describe(progress: TrainingProgress) -> str:
    """Write where a run is, for a person: epoch, step rate, loss and accuracy of each exit."""
    losses = " ".join(f"{value:.2f}" for value in progress.losses)
    accuracies = " ".join(f"{100 * value:.1f}" for value in progress.accuracies)
    return f"epoch {progress.epoch}/{progress.epochs}  {progress.rate:.0f} steps/s  loss {losses}  acc {accuracies} %"


class TrainProgress:
    """Shows the progress of one run; call it with each report."""

    def __init__(self) -> None:
        self.speaks = int(os.environ.get("RANK", "0")) == 0
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not (self.speaks and self._console.is_terminal),
        )
        self._task: Any = None
        self._next_line = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, progress: TrainingProgress) -> None:
        """Show one report."""
        if self._bar.disable:
            self._print_line(progress)
            return
        if self._task is None:
            self._task = self._bar.add_task("", total=1.0)
        self._bar.update(self._task, completed=progress.fraction, description=describe(progress))

    def _print_line(self, progress: TrainingProgress) -> None:
        now = time.monotonic()
        last = progress.epoch_done and progress.fraction >= 1
        if self.speaks and progress.epoch_done and (now >= self._next_line or last):
            self._next_line = now + _LINE_INTERVAL
            self._console.print(describe(progress), highlight=False, soft_wrap=True)
