"""A run's metrics as a TensorBoard log: one scalar per metric, exit and epoch."""

from __future__ import annotations

import io
import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exitkit.errors import Note, UserError
from exitkit.files import disk_error
from exitkit.strategy.run import Run
from exitkit.training.observers import EpochEnd, Observer

FOLDER = "tensorboard"


class TensorBoardLog(Observer):
    """Writes the rows of `metrics.csv` into a run's folder `tensorboard`, as scalars over the epochs of all phases.

    `train_loss_2` becomes `train_loss/exit 2`. The first call replaces the log of an earlier process by all epochs so
    far, so that a resumed run has every epoch once.

    Args:
        run: the run's folder.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, run: Path) -> None:
        if find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs tensorboard; install it with: pip install 'exitkit[tensorboard]'")
        self._folder = run / FOLDER
        self._path: Path | None = None
        self._written = 0

    def on_epoch_saved(self, run: Run, end: EpochEnd) -> None:
        """Write the epochs that are not written yet."""
        self.write(end.history.metrics)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write those of a run's epochs that are not written yet; all of them, if the log was deleted meanwhile.

        Raises:
            UserError: the log can't be written.
        """
        try:
            if self._path is None:
                shutil.rmtree(self._folder, ignore_errors=True)
            elif not self._path.is_file():
                warnings.warn(Note(f"{self._folder} was deleted; all epochs are written again"), stacklevel=2)
                self._path = None
            if self._path is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._path = self._folder / f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}"
                self._written = 0
            content = self._records(rows)
            with self._path.open("ab") as file:
                file.write(content)
        except OSError as error:
            raise disk_error(self._folder, error) from None
        self._written = len(rows)

    def _records(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        """Return the records of the epochs that are not written yet.

        They are not written by torch's SummaryWriter, whose thread prints a traceback if it can't write.
        """
        # Imported when used: tensorboard is an optional package.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import scalar

        content = io.BytesIO()
        writer = RecordWriter(content)
        if self._written == 0:
            writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        for step, row in enumerate(rows[self._written :], self._written + 1):
            for name, value in row.items():
                if name not in ("phase", "epoch"):
                    summary = scalar(re.sub(r"_(\d+)$", r"/exit \1", name), value)
                    writer.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())
        return content.getvalue()
