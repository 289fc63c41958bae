"""A campaign's progress: a bar for the whole and one for each run under way; a line a finished run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from exitkit.benchmarks.campaign.estimate import in_words, wall_time
from exitkit.benchmarks.campaign.launchers import Event
from exitkit.benchmarks.report.labels import name_runs
from exitkit.runs.recipe import flat_identity

if TYPE_CHECKING:
    from exitkit.runs.recipe import ResolvedRecipe


class CampaignDisplay:
    """Shows a campaign; call it with each event.

    Args:
        recipes: the runs to come, as the events number them.
        planned: how many runs the comparison has, finished ones included.
    """

    def __init__(self, recipes: Sequence[ResolvedRecipe], planned: int) -> None:
        self._names = [f"{name} seed {recipe.seed}" for name, recipe in zip(_names(recipes), recipes, strict=True)]
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
            self._tasks[event.index] = self._bars.add_task(escape(name), total=1.0, note="starting")
            if not self._bars.console.is_terminal:  # there are no bars then, and a long run would leave all silent
                self._say(f"{self._finished}/{self._planned}  {name} started")
        elif event.kind == "progress":
            self._progress(event)
        elif event.kind == "held":
            self._bars.remove_task(self._tasks.pop(event.index))
            self._say(f"{self._finished}/{self._planned}  {name} is being trained by another process")
        else:
            self._shares[event.index] = 1.0
            self._finished += event.kind == "done"
            if event.index in self._tasks:
                self._bars.remove_task(self._tasks.pop(event.index))
            where = " elsewhere" if event.facts.get("elsewhere") else ""
            outcome = f"finished{where}" if event.kind == "done" else f"failed: {event.facts['message']}"
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


def announce(recipes: Sequence[ResolvedRecipe], seconds: Mapping[str, float], jobs: int, whole: bool) -> None:
    """Show what a campaign will do and about how long that takes.

    Args:
        recipes: of all its runs.
        seconds: {name: about how long} of those that are still to be trained.
        jobs: how many at once.
        whole: a table with a line a method, network and data set, instead of one line in all.
    """
    console = Console(stderr=not whole, highlight=False)
    done = len(recipes) - len(seconds)
    finished = f", {done} of them finished" if done else ""
    about = f"about {in_words(wall_time(list(seconds.values()), jobs))}" if seconds else "nothing to train"
    if whole:
        table = Table(box=box.SIMPLE_HEAVY, padding=(0, 1, 0, 0), header_style="bold cyan")
        for head in ("method", "network", "data", "epochs", "seeds", "finished", "to train"):
            words = head in ("method", "network", "data")
            table.add_column(head, justify="left" if words else "right", overflow="fold", no_wrap=not words)
        lines: dict[tuple[str, str, str], list[ResolvedRecipe]] = {}
        for names, recipe in zip(name_runs([flat_identity(recipe) for recipe in recipes]), recipes, strict=True):
            lines.setdefault((names.method, names.backbone, names.dataset), []).append(recipe)
        for line, same in lines.items():
            left = [seconds[recipe.id] for recipe in same if recipe.id in seconds]
            cells = [str(same[0].epochs), ",".join(str(r.seed) for r in same), str(len(same) - len(left))]
            table.add_row(*map(escape, line), *cells, in_words(sum(left)) if left else "–")
        console.print(table)
    at_once = f", {min(jobs, len(seconds))} at a time" if len(seconds) > 1 else ""
    console.print(f"plan: {len(recipes)} runs{finished}; {about}{at_once}", soft_wrap=True)


def _names(recipes: Sequence[ResolvedRecipe]) -> list[str]:
    """Name runs by their method, and by network and data where there are several."""
    names = name_runs([flat_identity(recipe) for recipe in recipes])
    parts = [place for place in range(3) if place == 0 or len({name[place] for name in names}) > 1]
    return [" ".join(name[place] for place in parts) for name in names]
