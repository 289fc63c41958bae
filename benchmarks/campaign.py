"""Many independent runs at once, each in a process of its own kind: one a core, or one a GPU."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitkit.errors import UserError
from exitkit.ingredients import teacher_recipes

if TYPE_CHECKING:
    from exitkit.recipe import Recipe


_LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


@dataclass(frozen=True)
class Event:
    """What a campaign says while it goes: run number `index` has begun, progressed, is done or has failed."""

    index: int
    kind: str
    facts: dict[str, Any]


class _Worker:
    """One worker process and the thread that listens to it."""

    def __init__(self, threads: int, events: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        self.index = -1
        # Whatever launched the campaign may have left its ranks' variables; a run here is one process.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "exitkit.benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C is for the campaign, which then ends its workers
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put((self, json.loads(line)))
        events.put((self, None))

    def give(self, index: int, recipe: Recipe, out: Path) -> None:
        """Hand over a run."""
        self.index = index
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a worker that is dead already says so by its closed output
            self.process.stdin.write(json.dumps({"recipe": recipe.model_dump(mode="json"), "out": str(out)}) + "\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """End the process, now; a run that it was at goes on from its checkpoint another time."""
        self.process.kill()
        self.process.wait()


def default_jobs(device: str, threads: int) -> int:
    """Return how many runs to have at once: one a GPU, or as many as there are cores for their threads."""
    import torch

    from exitkit.engine import choose_device

    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.device_count()
    if choose_device(device).type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // threads, 1)


def run_campaign(recipes: Sequence[Recipe], out: Path, jobs: int, tell: Callable[[Event], None]) -> dict[int, str]:
    """Train all recipes that are not finished yet, longest first, `jobs` at a time.

    Returns {index: reason} of those that diverged; the others are finished.

    Raises:
        UserError: a run failed for another reason; all are stopped, and what is finished stays.
    """
    order = sorted(range(len(recipes)), key=lambda index: (-_length(recipes[index]), index))
    needs = {index: {teacher.id for teacher in teacher_recipes(recipes[index]).values()} for index in order}
    pending = {recipe.id for recipe in recipes}
    events: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
    workers: list[_Worker] = []
    idle: list[_Worker] = []
    diverged: dict[int, str] = {}
    try:
        for _ in range(min(jobs, len(order))):
            workers.append(_Worker(recipes[0].threads, events))
            idle.append(workers[-1])
        while True:
            ready = [index for index in order if not needs[index] & pending]
            while idle and ready:
                worker = idle.pop(0)
                order.remove(ready[0])
                _give(worker, ready.pop(0), recipes, out, tell, workers.index(worker))
            if len(idle) == len(workers):
                break
            worker, answer = events.get()
            if answer is None:
                raise UserError(
                    f"the process training {recipes[worker.index].id} ended by itself (exit code "
                    f"{worker.process.wait()}; out of memory?); start again to go on where it was"
                )
            kind = answer.pop("event")
            tell(Event(worker.index, kind, answer))
            if kind == "progress":
                continue
            if kind == "failed" and not answer["diverged"]:
                raise UserError(answer["message"])
            if kind == "failed":
                diverged[worker.index] = answer["message"]
            pending.discard(recipes[worker.index].id)
            idle.append(worker)
    finally:
        for worker in workers:
            worker.end()
    return diverged


def _give(
    worker: _Worker,
    index: int,
    recipes: Sequence[Recipe],
    out: Path,
    tell: Callable[[Event], None],
    number: int,
) -> None:
    import torch

    recipe = recipes[index]
    if torch.cuda.is_available() and recipe.device in ("auto", "cuda"):
        recipe = recipe.with_values(device=f"cuda:{number % torch.cuda.device_count()}")
    worker.give(index, recipe, out)
    tell(Event(index, "begun", {}))


def _length(recipe: Recipe) -> int:
    """Return a measure of how long a run takes: its passes over the data."""
    from exitkit.build import build_strategy

    assert recipe.epochs is not None
    exits = 8  # how many the network will have is not known here; any number puts the methods in order
    phases = build_strategy(recipe.method, **recipe.method_settings).phases(recipe.epochs, exits)
    return sum(phase.epochs * phase.strategy.passes(exits) for phase in phases)
