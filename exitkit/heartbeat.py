"""A training's heartbeat: where it is, in its folder every few seconds, for whoever watches from outside."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from exitkit.files import beside

if TYPE_CHECKING:
    from exitkit.feed import Progress

PROGRESS = "progress.json"
INTERVAL = 5.0
"""Seconds between two beats."""


class Heartbeat:
    """Writes each report of a training, at most one every `INTERVAL` seconds, into the run's folder; then passes it on.

    The file holds the fields of `Progress`, and `host`, `when` (seconds since 1970) and `seconds_left` (or null, while
    that can't be told). It is a convenience: where it can't be written, training goes on without.

    Args:
        folder: the run's; before it is there, nothing is written.
        report: who else wants to know.
        main: whether this process is the one that writes files.
    """

    def __init__(self, folder: Path, report: Callable[[Progress], None], main: bool = True) -> None:
        self._path, self._report, self._main = folder / PROGRESS, report, main
        self._first: tuple[float, float] | None = None
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        """Take one report."""
        now = time.monotonic()
        self._first = self._first or (now, progress.fraction)
        if self._main and (now >= self._next or progress.epoch_done):
            self._next = now + INTERVAL
            self._write(asdict(progress) | {"seconds_left": self._left(now, progress.fraction)})
        self._report(progress)

    def stop(self) -> None:
        """Take the file away: training has come to its end."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _left(self, now: float, fraction: float) -> float | None:
        assert self._first is not None
        began, before = self._first
        return (1 - fraction) * (now - began) / (fraction - before) if fraction > before else None

    def _write(self, facts: dict[str, object]) -> None:
        # Renamed into place, but not forced to the disk: a beat that is lost is followed by another.
        temporary = beside(self._path)
        with contextlib.suppress(OSError):
            try:
                temporary.write_text(json.dumps(facts | {"host": platform.node(), "when": time.time()}) + "\n")
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)
