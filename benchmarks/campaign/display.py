"""Progress display of a campaign: progress bars on a terminal, one line per event elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich import box
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from exitkit.benchmarks.campaign.estimate import in_words, wall_time
from exitkit.benchmarks.campaign.launchers import Event
from exitkit.benchmarks.report.labels import name_runs
from exitkit.cli.terminal import Console
from exitkit.escaping import counted
from exitkit.runs.recipe import flat_identity

if TYPE_CHECKING:
    from exitkit.runs.recipe import ResolvedRecipe


class CampaignDisplay:
    """Shows the progress of a campaign; it is called with each event.

    Args:
        recipes: the runs to train, indexed as in the events.
        planned: number of runs in the comparison, including finished ones.
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
            self._print(f"already finished: {self._finished} of {counted(self._planned, 'run')}")
        self._bars.start()
        self._refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if error is None and self._shares:
            minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
            self._print(f"trained {counted(len(self._shares), 'run')} in {minutes} min {seconds} s")

    def __call__(self, event: Event) -> None:
        """Show one event."""
        name = self._names[event.index]
        if event.kind == "begun":
            self._tasks[event.index] = self._bars.add_task(escape(name), total=1.0, note="starting")
            if not self._bars.console.is_terminal:  # without bars, nothing else is printed before the run ends
                self._print(f"{self._finished}/{self._planned}  {name} started")
        elif event.kind == "progress":
            self._progress(event)
        elif event.kind == "held":
            self._bars.remove_task(self._tasks.pop(event.index))
            self._print(f"{self._finished}/{self._planned}  {name} is being trained by another process")
        else:
            self._shares[event.index] = 1.0
            self._finished += event.kind == "done"
            if event.index in self._tasks:
                self._bars.remove_task(self._tasks.pop(event.index))
            where = " by another process" if event.facts.get("elsewhere") else ""
            outcome = f"finished{where}" if event.kind == "done" else f"failed: {event.facts['message']}"
            self._print(f"{self._finished}/{self._planned}  {name} {outcome}")
        self._refresh()

    def _progress(self, event: Event) -> None:
        facts = event.facts
        self._shares[event.index] = facts["fraction"]
        note = f"epoch {facts['epoch']}/{facts['epochs']}  {facts['rate']:.0f} steps/s"
        if accuracies := facts["accuracies"]:  # none while features are stored
            note += f"  last exit {100 * accuracies[-1]:.1f} %"
        self._bars.update(self._tasks[event.index], completed=facts["fraction"], note=note)

    def _refresh(self) -> None:
        description = f"[bold]{self._finished} of {counted(self._planned, 'run')}"
        self._bars.update(self._whole, completed=sum(self._shares), description=description)

    def _print(self, line: str) -> None:
        self._bars.console.print(line, soft_wrap=True, markup=False)


def announce(
    recipes: Sequence[ResolvedRecipe],
    images: Mapping[str, Sequence[str]],
    seconds: Mapping[str, float],
    peaks: Mapping[str, float],
    jobs: int,
    whole: bool,
) -> None:
    """Print the images and the plan of a campaign, and its estimated time and memory.

    Args:
        recipes: the recipes of all runs.
        images: {data set: lines that describe its images}.
        seconds: {name: estimated seconds} of the runs that are not finished; NaN: unknown.
        peaks: {name: estimated peak memory in MiB} of these runs, where it is known.
        jobs: number of parallel runs.
        whole: print a table with one row per method, network and data set before the summary line.
    """
    console = Console(stderr=not whole, highlight=False)
    done = len(recipes) - len(seconds)
    finished = f", {done} of them finished" if done else ""
    about = _about(list(seconds.values()), jobs)
    for name, lines in images.items():
        for line in lines:
            console.print(f"{name}: {line}" if line == lines[0] else f"  {line}", markup=False)
    if whole:
        table = Table(box=box.SIMPLE_HEAVY, padding=(0, 1, 0, 0), header_style="bold cyan")
        for head in ("method", "network", "data", "epochs", "seeds", "finished", "to train"):
            is_text = head in ("method", "network", "data")
            table.add_column(head, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
        groups: dict[tuple[str, str, str], list[ResolvedRecipe]] = {}
        for names, recipe in zip(name_runs([flat_identity(recipe) for recipe in recipes]), recipes, strict=True):
            groups.setdefault((names.method, names.backbone, names.dataset), []).append(recipe)
        for names_of_group, seeds in groups.items():
            remaining = [seconds[recipe.id] for recipe in seeds if recipe.id in seconds]
            cells = [str(seeds[0].epochs), ",".join(str(r.seed) for r in seeds), str(len(seeds) - len(remaining))]
            table.add_row(*map(escape, names_of_group), *cells, _in_words(remaining))
        console.print(table)
    parallel = f", {min(jobs, len(seconds))} at a time" if len(seconds) > 1 else ""
    memory = f", up to {max(peaks.values()) / 1024:.1f} GiB of memory each" if peaks else ""
    console.print(f"plan: {counted(len(recipes), 'run')}{finished}; {about}{parallel}{memory}", soft_wrap=True)


def _about(seconds: Sequence[float], jobs: int) -> str:
    """Return the time of all runs as text; `seconds` of each run, NaN if it is unknown."""
    known = [each for each in seconds if not math.isnan(each)]
    if not seconds:
        return "nothing to train"
    if not known:
        return "unknown time (give --seconds-per-run)"
    rest = f", and {counted(len(seconds) - len(known), 'run')} of unknown time (give --seconds-per-run)"
    return f"about {in_words(wall_time(known, jobs))}{rest if len(known) < len(seconds) else ''}"


def _in_words(seconds: Sequence[float]) -> str:
    return "–" if not seconds else "unknown" if any(map(math.isnan, seconds)) else in_words(sum(seconds))


def _names(recipes: Sequence[ResolvedRecipe]) -> list[str]:
    """Return the name of each run: its method, and its network and data set if the runs have several."""
    names = name_runs([flat_identity(recipe) for recipe in recipes])
    fields = [field for field in range(3) if field == 0 or len({name[field] for name in names}) > 1]
    return [" ".join(name[field] for field in fields) for name in names]
