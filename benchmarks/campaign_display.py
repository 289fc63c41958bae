"""A campaign's progress: a bar for the whole and one for each run under way; a line a finished run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from exitkit.benchmarks.campaign import Event

if TYPE_CHECKING:
    from exitkit.recipe import Recipe


class CampaignDisplay:
    """Shows a campaign; call it with each event.

    Args:
        recipes: the runs to come, as the events number them.
        planned: how many runs the comparison has, finished ones included.
    """

    def __init__(self, recipes: Sequence[Recipe], planned: int) -> None:
        self._names = [f"{recipe.method} seed {recipe.seed}" for recipe in recipes]
        self._planned = planned
        self._began = time.monotonic()
        self._finished = planned - len(recipes)
        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[int, TaskID] = {}
        self._whole = self._bars.add_task("", total=max(len(recipes), 1), note="")
        self._shares = [0.0] * len(recipes)

    def __enter__(self) -> Self:
        if self._finished:
            self._say(f"{self._finished} of {self._planned} runs are finished already")
        self._bars.start()
        self._refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if error is None and self._shares:
            minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
            self._say(f"trained {len(self._shares)} runs in {minutes} min {seconds} s")

    def __call__(self, event: Event) -> None:
        """Show one event."""
        name = self._names[event.index]
        if event.kind == "begun":
            self._tasks[event.index] = self._bars.add_task(name, total=1.0, note="starting")
        elif event.kind == "progress":
            self._progress(event)
        else:
            self._shares[event.index] = 1.0
            self._finished += event.kind == "done"
            self._bars.remove_task(self._tasks.pop(event.index))
            outcome = "finished" if event.kind == "done" else f"failed: {event.facts['message']}"
            self._say(f"{self._finished}/{self._planned}  {name} {outcome}")
        self._refresh()

    def _progress(self, event: Event) -> None:
        facts = event.facts
        self._shares[event.index] = facts["fraction"]
        last = f"last exit {100 * facts['accuracies'][-1]:.1f} %"
        note = f"epoch {facts['epoch']}/{facts['epochs']}  {facts['rate']:.0f} steps/s  {last}"
        self._bars.update(self._tasks[event.index], completed=facts["fraction"], note=note)

    def _refresh(self) -> None:
        description = f"[bold]{self._finished} of {self._planned} runs"
        self._bars.update(self._whole, completed=sum(self._shares), description=description)

    def _say(self, line: str) -> None:
        self._bars.console.print(line, soft_wrap=True, markup=False)
