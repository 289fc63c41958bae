"""A run's metrics as a TensorBoard log: one scalar per metric, exit and epoch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitkit.errors import UserError
from exitkit.files import disk_error
from exitkit.strategy.run import Run
from exitkit.training.observers import EpochEnd, Observer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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
        self._writer: SummaryWriter | None = None
        self._written = 0

    def on_epoch_saved(self, run: Run, end: EpochEnd) -> None:
        """Write the epochs that are not written yet."""
        self.write(end.history.metrics)

    def on_training_end(self) -> None:
        """Close the file."""
        self.close()

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write those of a run's epochs that are not written yet.

        Raises:
            UserError: the log can't be written.
        """
        try:
            if self._writer is None:
                # Imported when used: tensorboard is an optional package.
                from torch.utils.tensorboard import SummaryWriter

                shutil.rmtree(self._folder, ignore_errors=True)
                self._writer = SummaryWriter(str(self._folder))
            for step, row in enumerate(rows[self._written :], self._written + 1):
                for name, value in row.items():
                    if name not in ("phase", "epoch"):
                        tag = re.sub(r"_(\d+)$", r"/exit \1", name)
                        self._writer.add_scalar(tag, value, step)
            self._writer.flush()
        except OSError as error:
            raise disk_error(self._folder, error) from None
        self._written = len(rows)

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
