"""Progress reporting, to the caller and to a file in the run's folder."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from exitkit.files import beside

PROGRESS = "progress.json"
INTERVAL = 5.0
"""Seconds between two writes of the file."""


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        phase: the phase's name.
        epoch: the current epoch (or the one that has just ended), from 1, of `epochs`.
        fraction: share of the whole run that is done, 0..1.
        rate: steps per second.
        losses: mean training loss of each exit in this pass.
        accuracies: training accuracy of each exit in this pass, 0..1.
        epoch_done: whether this is the end of an epoch.
    """

    phase: str
    epoch: int
    epochs: int
    fraction: float
    rate: float
    losses: list[float]
    accuracies: list[float]
    epoch_done: bool = False


Report = Callable[[Progress], None]
"""A function that is called with the progress a few times per second."""


class ProgressFile:
    """Writes the progress into the run's folder, at most once every `INTERVAL` seconds, and passes it to `report`.

    The file contains the fields of `Progress`, and `host`, `when` (seconds since 1970) and `seconds_left` (null while
    it is unknown). If it can't be written, training continues without it.

    Args:
        folder: the run's folder; before it exists, nothing is written.
        report: called with every progress.
        main: whether this process is the one that writes files.
    """

    def __init__(self, folder: Path, report: Callable[[Progress], None], main: bool = True) -> None:
        self._path, self._report, self._main = folder / PROGRESS, report, main
        self._first: tuple[float, float] | None = None
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        """Record one progress."""
        now = time.monotonic()
        self._first = self._first or (now, progress.fraction)
        if self._main and (now >= self._next or progress.epoch_done):
            self._next = now + INTERVAL
            facts = asdict(progress) | {"seconds_left": self._seconds_left(now, progress.fraction)}
            for name in ("losses", "accuracies"):  # JSON has no number that is not finite
                facts[name] = [value if math.isfinite(value) else None for value in facts[name]]
            self._write(facts)
        self._report(progress)

    def stop(self) -> None:
        """Delete the file: training has ended."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _seconds_left(self, now: float, fraction: float) -> float | None:
        assert self._first is not None
        start, first = self._first
        return (1 - fraction) * (now - start) / (fraction - first) if fraction > first else None

    def _write(self, facts: dict[str, object]) -> None:
        # Renamed into place, but not forced to the disk: the next write follows soon.
        temporary = beside(self._path)
        with contextlib.suppress(OSError):
            try:
                content = json.dumps(facts | {"host": platform.node(), "when": time.time()}) + "\n"
                temporary.write_text(content, encoding="utf-8")
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)
