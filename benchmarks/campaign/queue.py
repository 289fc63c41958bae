"""Many independent runs: which comes when, what becomes of those that fail, and of those that someone else is at."""

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

_POLL = 2.0  # seconds between two looks at a run that another process is at


class Campaign:
    """Trains recipes that are not finished yet, the longest first, as many at once as the launcher takes.

    A run that fails leaves the others going on. A run that another process is at is waited for, and taken over if that
    process dies. A run whose teacher is another comes after it.

    Args:
        recipes: resolved.
        out: where run folders go; several campaigns, on several machines, may share it.
        launcher: what trains them.
        tell: called with every event.
    """

    def __init__(
        self, recipes: Sequence[ResolvedRecipe], out: Path, launcher: Launcher, tell: Callable[[Event], None]
    ) -> None:
        self.recipes, self.out, self.launcher, self.tell = recipes, out, launcher, tell
        self.order = sorted(range(len(recipes)), key=lambda index: (-_length(recipes[index]), index))
        self.needs = [{teacher.id for teacher in teacher_recipes(recipe).values()} for recipe in recipes]
        self.pending = {recipe.id for recipe in recipes}
        self.failed: dict[int, str] = {}

    def run(self) -> dict[int, str]:
        """Train them all, and return {index: reason} of those that failed."""
        under_way: set[int] = set()
        try:
            while self.order or under_way:
                while len(under_way) < self.launcher.slots and (index := self._next()) is not None:
                    forget_failure(self.out, self.recipes[index])
                    self.launcher.start(index, self.recipes[index], self.out)
                    self.tell(Event(index, "begun", {}))
                    under_way.add(index)
                if not under_way:
                    if self.order:
                        time.sleep(_POLL)  # all that is left is others' work, or waits for it
                    continue
                event = self.launcher.wait()
                if event.kind == "held":
                    self.order.append(event.index)
                elif event.kind == "failed":
                    self._fail(event.index, event.facts["message"])
                elif event.kind == "done":
                    self.pending.discard(self.recipes[event.index].id)
                self.tell(event)
                if event.kind != "progress":
                    under_way.discard(event.index)
        finally:
            self.launcher.close()
        return self.failed

    def _next(self) -> int | None:
        """Return a run that can begin now, and take from the queue those that have come to an end elsewhere."""
        for index in list(self.order):
            path = self.out / self.recipes[index].id
            lost = [name for name in self.needs[index] if name in self._failed_names]
            if RunFolder.is_finished(path):
                self.order.remove(index)
                self.pending.discard(self.recipes[index].id)
                self.tell(Event(index, "done", {"elsewhere": True}))
            elif lost:
                self.order.remove(index)
                self._fail(index, f"its teacher {lost[0]} failed")
                self.tell(Event(index, "failed", {"message": self.failed[index]}))
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


def _length(recipe: ResolvedRecipe) -> int:
    """Return a measure of how long a run takes: its passes over the data."""
    # Imported when used: the command line's help must not load torch.
    from exitkit.runs.job import make_phases, make_strategy

    exits = 8  # how many the network will have is not known here; any number puts the methods in order
    phases = make_phases(make_strategy(recipe), recipe.epochs, exits)
    return sum(phase.epochs * phase.strategy.passes(exits) for phase in phases)
