"""The state of the runs of a folder, read from their files; nothing is written, and torch is not imported."""

from __future__ import annotations

import csv
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exitkit.benchmarks.campaign.record import FAILURES, PLAN
from exitkit.runs.folder import RESULTS, RunFolder
from exitkit.training.progress import INTERVAL, PROGRESS

STATES = ("running", "stalled", "failed", "waiting", "finished")
"""In the order in which `exitkit watch` shows them."""

_FRESH = 3 * INTERVAL  # seconds after a run's folder was created during which its lock is not checked
_PATIENCE = 120.0  # seconds; no progress is reported at the start and during validation
_NAMES = ("method", "backbone", "dataset", "seed")


@dataclass
class Watched:
    """The state of one run.

    Attributes:
        run: name of its folder.
        recipe: values of its recipe; empty if they can't be read.
        state: one of `STATES`; "stalled": started, but its process has ended or has not reported progress for too long.
        phase: current phase, at `epoch` of `epochs`.
        fraction: completed fraction of the run, 0..1.
        train_losses: loss of each exit in the current epoch.
        validation_accuracies: accuracy of each exit after the last completed epoch, in percent.
        test_accuracies: test accuracy of each exit of a finished run, in percent.
        seconds: time of the completed epochs, in seconds.
        seconds_left: estimated remaining time, in seconds; None if unknown.
        note: reason why the run failed or is considered stalled.
    """

    run: str
    recipe: Mapping[str, Any]
    state: str = "waiting"
    phase: str = ""
    epoch: int = 0
    epochs: int | None = None
    fraction: float = 0.0
    train_losses: list[float] = field(default_factory=list)
    validation_accuracies: list[float] = field(default_factory=list)
    test_accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    seconds_left: float | None = None
    note: str = ""


def look(folder: Path) -> list[Watched]:
    """Return the planned and started runs of a folder, planned ones first; unreadable files leave default values."""
    planned = _read(folder / PLAN).get("runs")
    recipes: dict[str, Mapping[str, Any]] = {}
    for run in planned if isinstance(planned, list) else ():
        if isinstance(run, dict) and isinstance(run.get("run"), str):
            recipes[run["run"]] = run.get("recipe") or {}
    for path in sorted(folder.glob("[!.]*/recipe.json")):
        recipes.setdefault(path.parent.name, _read(path))
    return [_watched(folder, name, recipe) for name, recipe in recipes.items()]


def seconds_left(runs: Sequence[Watched]) -> float | None:
    """Return the estimated seconds until all runs are finished, with as many in parallel as now; None if unknown.

    A waiting run is assumed to take as long as the finished runs of its method, or else as all finished runs.
    """
    finished = [run for run in runs if run.state == "finished"]
    total = 0.0
    for run in runs:
        if run.state in ("finished", "failed"):
            continue
        same_method = [other.seconds for other in finished if other.recipe.get("method") == run.recipe.get("method")]
        durations = same_method or [other.seconds for other in finished]
        remaining = run.seconds_left
        if remaining is None and durations:
            remaining = (1 - run.fraction) * sum(durations) / len(durations)
        if remaining is None:
            return None
        total += remaining
    parallel = sum(run.state == "running" for run in runs)
    return total / parallel if parallel else None


def labels(runs: Sequence[Watched]) -> list[str]:
    """Return a short name per run: method, seed, and the other fields in which the runs differ."""
    values = [_flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in values for key in recipe)
    varying = [key for key in keys if len({str(recipe.get(key)) for recipe in values}) > 1]
    names = []
    for run, recipe in zip(runs, values, strict=True):
        words = [str(recipe.get(key, "?")) for key in _NAMES[:3] if key == "method" or key in varying]
        # Methods have different fields; a field is shown only if runs of the same method, data and seed differ in it.
        twins = [other for other in values if all(other.get(name) == recipe.get(name) for name in _NAMES)]
        shown = [key for key in varying if key not in _NAMES and len({str(twin.get(key)) for twin in twins}) > 1]
        fields = [f"{key.rpartition('.')[2]}={recipe[key]}" for key in shown if key in recipe]
        names.append(" ".join([*words, *fields, f"s{recipe.get('seed', '?')}"]) if recipe else run.run)
    return names


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": _plain(item) for name, item in value.items()}
        else:
            flat[key] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _watched(folder: Path, name: str, recipe: Mapping[str, Any]) -> Watched:
    path = folder / name
    watched = Watched(name, recipe, epochs=recipe.get("epochs"))
    progress = _read(path / PROGRESS)
    metrics = _rows(path / "metrics.csv")
    watched.seconds = sum(_number(row.get("seconds")) for row in _rows(path / "timing.csv"))
    if metrics:
        last = metrics[-1]
        watched.phase, watched.epoch = str(last.get("phase")), int(_number(last.get("epoch")))
        watched.validation_accuracies = _exits(last, "validation_accuracy_")
        watched.train_losses = _exits(last, "train_loss_")
        watched.fraction = min(len(metrics) / watched.epochs, 1.0) if watched.epochs else 0.0
    if progress:
        watched.phase, watched.epoch = str(progress.get("phase")), progress.get("epoch", 0)
        watched.epochs, watched.fraction = progress.get("epochs"), _number(progress.get("fraction"))
        watched.train_losses = progress.get("losses") or watched.train_losses
    results = _read(path / RESULTS)
    if results:
        watched.state, watched.fraction, watched.test_accuracies = "finished", 1.0, results.get("test") or []
        watched.phase, watched.epoch, watched.epochs = "", len(metrics), len(metrics)
        return watched
    watched.state, watched.note = _state(folder, path, progress, watched.seconds / len(metrics) if metrics else 0.0)
    if watched.state == "running":
        watched.seconds_left = progress.get("seconds_left")
    return watched


def _state(folder: Path, path: Path, progress: Mapping[str, Any], epoch_seconds: float) -> tuple[str, str]:
    """Return the state of an unfinished run, and the reason."""
    failure = folder / FAILURES / f"{path.name}.json"
    reason = str(_read(failure).get("reason", ""))
    if not (path / "recipe.json").is_file():
        return ("failed", reason) if reason else ("waiting", "")
    last_report = max(_number(progress.get("when")), _changed(path))
    if reason and _changed(failure) >= last_report:
        return "failed", reason
    silence = time.time() - last_report
    if silence < _FRESH and not progress:  # the folder was just created, and its lock may not be held yet
        return "running", ""
    # A lock is reliably visible only on the machine that holds it.
    if progress.get("host", platform.node()) == platform.node() and not RunFolder.is_held(path):
        return ("failed", reason) if reason else ("stalled", "no process trains it; run the same command again")
    if silence > max(_PATIENCE, 3 * epoch_seconds):
        return "stalled", f"no progress for {round(silence / 60)} min"
    return "running", ""


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if the file is missing, incomplete or contains no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, ValueError, csv.Error):
        return []


def _exits(row: Mapping[str, str], prefix: str) -> list[float]:
    return [_number(value) for key, value in row.items() if key and key.startswith(prefix)]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
