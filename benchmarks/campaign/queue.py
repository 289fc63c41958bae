"""The queue of a campaign: the order of the runs, failed runs, and runs that another process trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exitkit.benchmarks.campaign.launchers import Event, Launcher
from exitkit.benchmarks.campaign.record import forget_failure, note_failure
from exitkit.runs.folder import RunFolder
from exitkit.runs.ingredients import teacher_recipes

if TYPE_CHECKING:
    from exitkit.runs.recipe import ResolvedRecipe

_POLL = 2.0  # seconds between checks of runs that another process trains


class Campaign:
    """Trains unfinished recipes, the longest first, `launcher.slots` in parallel.

    A failed run does not stop the others. The campaign waits for runs that another process trains, and takes them over
    if that process ends. A run starts after its teachers are finished.

    Args:
        recipes: resolved recipes.
        out: folder for the run folders; several campaigns, on several machines, may share it.
        launcher: trains the runs.
        report: called with every event.
    """

    def __init__(
        self, recipes: Sequence[ResolvedRecipe], out: Path, launcher: Launcher, report: Callable[[Event], None]
    ) -> None:
        self.recipes, self.out, self.launcher, self.report = recipes, out, launcher, report
        exits: dict[str, int] = {}
        self.order = sorted(range(len(recipes)), key=lambda index: (-_length(recipes[index], exits), index))
        self.needs = [{teacher.id for teacher in teacher_recipes(recipe).values()} for recipe in recipes]
        self.pending = {recipe.id for recipe in recipes}
        self.failed: dict[int, str] = {}

    def run(self) -> dict[int, str]:
        """Train all runs, and return {index: reason} of the failed ones."""
        running: set[int] = set()
        try:
            while self.order or running:
                while len(running) < self.launcher.slots and (index := self._next()) is not None:
                    forget_failure(self.out, self.recipes[index])
                    self.launcher.start(index, self.recipes[index], self.out)
                    self.report(Event(index, "begun", {}))
                    running.add(index)
                if not running:
                    if self.order:
                        time.sleep(_POLL)  # other processes train the remaining runs or their teachers
                    continue
                event = self.launcher.wait()
                if event.kind == "held":
                    self.order.append(event.index)
                elif event.kind == "failed":
                    self._fail(event.index, event.facts["message"])
                elif event.kind == "done":
                    self.pending.discard(self.recipes[event.index].id)
                self.report(event)
                if event.kind != "progress":
                    running.discard(event.index)
        finally:
            self.launcher.close()
        return self.failed

    def _next(self) -> int | None:
        """Return a run that can start; drop runs that another process has finished, and runs whose teacher failed."""
        for index in list(self.order):
            path = self.out / self.recipes[index].id
            failed_teachers = [name for name in self.needs[index] if name in self._failed_names]
            if RunFolder.is_finished(path):
                self.order.remove(index)
                self.pending.discard(self.recipes[index].id)
                self.report(Event(index, "done", {"elsewhere": True}))
            elif failed_teachers:
                self.order.remove(index)
                self._fail(index, f"its teacher {failed_teachers[0]} failed")
                self.report(Event(index, "failed", {"message": self.failed[index]}))
            elif not self.needs[index] & self.pending and not RunFolder.is_held(path):
                self.order.remove(index)
                return index
        return None

    @property
    def _failed_names(self) -> set[str]:
        return {self.recipes[index].id for index in self.failed}

    def _fail(self, index: int, reason: str) -> None:
        self.failed[index] = reason
        note_failure(self.out, self.recipes[index], reason)


def _length(recipe: ResolvedRecipe, known: dict[str, int]) -> int:
    """Return the number of passes over the training data, as a measure of the length of a run.

    Args:
        recipe: the recipe of the run.
        known: {network: number of its exits}, which is extended.
    """
    # Imported when used: the command line's help must not load torch.
    from exitkit.runs.job import count_exits, make_phases, make_strategy

    network = f"{recipe.backbone} {dict(recipe.backbone_settings)}"
    if network not in known:
        known[network] = count_exits(recipe)
    exits = known[network]
    phases = make_phases(make_strategy(recipe), recipe.epochs, exits)
    return sum(phase.epochs * phase.strategy.passes(exits) for phase in phases)
