"""Records of a run, per epoch; they are saved with every checkpoint."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TIMING_COLUMNS = ("phase", "epoch", "seconds", "peak_mib")


class EpochMeasures(NamedTuple):
    """Mean losses and accuracies (0..1) of the K exits."""

    losses: list[float]
    accuracies: list[float]


@dataclass
class History:
    """The records of a run.

    Attributes:
        metrics: one row per epoch, as in `metrics.csv`.
        timing: one row per epoch, as in `timing.csv`.
        probes: what was measured on the probe batch, one entry per probe.
        seconds: training time of the epoch in progress, up to the last checkpoint.
    """

    metrics: list[dict[str, Any]] = field(default_factory=list)
    timing: list[dict[str, Any]] = field(default_factory=list)
    probes: list[dict[str, Tensor]] = field(default_factory=list)
    seconds: float = 0.0

    def add_epoch(self, phase: str, epoch: int, lr: float, training: EpochMeasures, validation: EpochMeasures) -> None:
        """Add the metrics of an epoch (from 1): losses, and accuracies in percent."""
        row: dict[str, Any] = {"phase": phase, "epoch": epoch, "lr": lr}
        for part, measures in (("train", training), ("validation", validation)):
            row |= {f"{part}_loss_{number}": value for number, value in enumerate(measures.losses, 1)}
            row |= {f"{part}_accuracy_{number}": 100 * value for number, value in enumerate(measures.accuracies, 1)}
        self.metrics.append(row)

    def add_timing(self, phase: str, epoch: int, seconds: float, peak_mib: float) -> None:
        """Add the duration of an epoch, over all processes that trained it, and its peak memory in MiB."""
        values = (phase, epoch, round(seconds, 3), round(peak_mib, 1))
        self.timing.append(dict(zip(TIMING_COLUMNS, values, strict=True)))
        self.seconds = 0.0

    def stacked_probes(self) -> dict[str, Tensor]:
        """Return the measurements of all probes, stacked over T probes [T, ...]; missing ones are NaN."""
        templates = {name: value for record in self.probes for name, value in record.items()}
        return {
            name: torch.stack([r[name] if name in r else torch.full_like(value, torch.nan) for r in self.probes])
            for name, value in templates.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the records as a checkpoint stores them."""
        return {"metrics": self.metrics, "probes": self.probes, "timing": self.timing, "seconds": self.seconds}

    @classmethod
    def load(cls, state: Mapping[str, Any], folder: Path) -> History:
        """Restore the records from a checkpoint; earlier releases stored the timing in the folder only."""
        timing = state["timing"] if "timing" in state else read_timing(folder / "timing.csv")
        return cls(list(state["metrics"]), list(timing), list(state["probes"]), float(state.get("seconds", 0.0)))


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as the text of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_timing(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `timing.csv`, or no rows if it is missing or damaged."""
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        return [
            {
                "phase": row["phase"],
                "epoch": int(row["epoch"]),
                "seconds": float(row["seconds"]),
                "peak_mib": float(row["peak_mib"]),
            }
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []
