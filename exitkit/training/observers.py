"""Training observers, which the loop calls at the ends of epochs, phases and training."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from exitkit.errors import Note, UserError
from exitkit.files import save_tensors, write_json, write_text
from exitkit.runs.folder import LEARNED, METRICS, PROBES, RunFolder
from exitkit.strategy.base import LearnedTable, TrainingStrategy
from exitkit.strategy.run import Run
from exitkit.training.history import TIMING_COLUMNS, History, csv_text
from exitkit.training.progress import Progress, ProgressFile


@dataclass(frozen=True)
class EpochEnd:
    """Data for observers at the end of an epoch: the records so far, and the progress."""

    history: History
    progress: Progress


class Observer:
    """Base class of observers; subclasses override the methods that they need."""

    def on_epoch_end(self, run: Run, end: EpochEnd) -> None:
        """Called after every epoch and its validation, before the checkpoint is written."""

    def on_epoch_saved(self, run: Run, end: EpochEnd) -> None:
        """Called after every epoch, after its checkpoint is written."""

    def on_phase_end(self, run: Run, strategy: TrainingStrategy, phase: str) -> None:
        """Called after the last epoch of every phase."""

    def on_training_end(self) -> None:
        """Called after evaluation."""


class MetricsFiles(Observer):
    """Writes `metrics.csv`, `timing.csv` and the probes.

    They are written before the checkpoint: if the process is killed between the two, the epoch is trained again, and
    the files are written again.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_epoch_end(self, run: Run, end: EpochEnd) -> None:
        """Write the records so far."""
        history, path = end.history, self._folder.path
        write_text(path / METRICS, csv_text(history.metrics, list(history.metrics[0])))
        write_text(path / "timing.csv", csv_text(history.timing, TIMING_COLUMNS))
        if history.probes:
            save_tensors(path / PROBES, history.stacked_probes(), self._folder.name)


class LearnedTables(Observer):
    """Writes the tables that a phase's strategy learned besides the network, for `exitkit show`."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_phase_end(self, run: Run, strategy: TrainingStrategy, phase: str) -> None:
        """Add the phase's tables to those of the phases before."""
        try:
            tables = checked_tables(strategy, strategy.learned(run))
        except UserError as error:  # the network is trained; an error in a table must not fail the run
            warnings.warn(Note(f"not shown: {error}"), stacklevel=2)
            return
        if tables:
            earlier = [table for table in self._folder.learned() if table["phase"] != phase]
            write_json(self._folder.path / LEARNED, earlier + [{"phase": phase, **t._asdict()} for t in tables])


def checked_tables(strategy: TrainingStrategy, tables: Any) -> list[LearnedTable]:
    """Return the tables that `learned` returned, after checking them.

    Raises:
        UserError: they are not a list of tables whose values fit their rows and columns.
    """
    name = type(strategy).__name__
    if not isinstance(tables, list | tuple) or not all(isinstance(table, LearnedTable) for table in tables):
        kinds = (
            [type(table).__name__ for table in tables] if isinstance(tables, list | tuple) else type(tables).__name__
        )
        raise UserError(f"learned of {name} returned {kinds}; expected a list of LearnedTable")
    for table in tables:
        sizes = [len(row) for row in table.values]
        if sizes != [len(table.columns)] * len(table.rows):
            expected = f"{len(table.rows)} rows of {len(table.columns)} values"
            raise UserError(f"learned of {name}: table {table.title!r} has rows of {sizes} values; expected {expected}")
        if not all(value is None or isinstance(value, int | float) for row in table.values for value in row):
            raise UserError(f"learned of {name}: table {table.title!r} has values that are neither numbers nor None")
    return list(tables)


class Reporting(Observer):
    """Reports the progress after every epoch, and deletes the progress file after training."""

    def __init__(self, file: ProgressFile) -> None:
        self._file = file

    def on_epoch_saved(self, run: Run, end: EpochEnd) -> None:
        """Report the progress."""
        self._file(end.progress)

    def on_training_end(self) -> None:
        """Delete the progress file."""
        self._file.stop()
