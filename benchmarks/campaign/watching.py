"""Where the runs of a folder stand, told from their files alone; nothing is imported that trains, or written."""

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
"""In the order in which they are of interest."""

_FRESH = 3 * INTERVAL  # seconds after a run's folder was made during which nobody asks whether its process lives
_PATIENCE = 120.0  # seconds; validation between two epochs is silent, and so is the start
_NAMES = ("method", "backbone", "dataset", "seed")


@dataclass
class Watched:
    """One run.

    Attributes:
        run: its folder's name.
        recipe: its values, as far as they can be read.
        state: one of `STATES`; "stalled" is begun, but left by its process or silent for too long.
        phase: the phase under way, with `epoch` of `epochs` in it.
        fraction: share of the whole run that is done, 0..1.
        train_losses: of each exit, in the epoch under way.
        validation_accuracies: of each exit after the last whole epoch, in percent.
        test_accuracies: of each exit, in percent, of a finished run.
        seconds: what its epochs took so far.
        seconds_left: about how long it will still take.
        note: why it failed or is thought to have stalled.
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
    """Return the runs that are planned or begun in a folder, planned ones first; what can't be read is left open."""
    planned = _read(folder / PLAN).get("runs")
    recipes: dict[str, Mapping[str, Any]] = {}
    for each in planned if isinstance(planned, list) else ():
        if isinstance(each, dict) and isinstance(each.get("run"), str):
            recipes[each["run"]] = each.get("recipe") or {}
    for path in sorted(folder.glob("[!.]*/recipe.json")):
        recipes.setdefault(path.parent.name, _read(path))
    return [_look(folder, name, recipe) for name, recipe in recipes.items()]


def seconds_left(runs: Sequence[Watched]) -> float | None:
    """Return about how long it takes until all are finished, as many at once as now; None while that can't be told.

    A run that waits is taken to be as long as the finished ones of its method, or of any.
    """
    finished = [run for run in runs if run.state == "finished"]
    total = 0.0
    for run in runs:
        if run.state in ("finished", "failed"):
            continue
        alike = [other.seconds for other in finished if other.recipe.get("method") == run.recipe.get("method")]
        others = alike or [other.seconds for other in finished]
        left = run.seconds_left
        if left is None and others:
            left = (1 - run.fraction) * sum(others) / len(others)
        if left is None:
            return None
        total += left
    at_once = sum(run.state == "running" for run in runs)
    return total / at_once if at_once else None


def labels(runs: Sequence[Watched]) -> list[str]:
    """Name each run by what tells it from the others: method and seed, and whatever else differs among them."""
    values = [_flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for each in values for key in each)
    differ = [key for key in keys if len({str(each.get(key)) for each in values}) > 1]
    found = []
    for run, each in zip(runs, values, strict=True):
        words = [str(each.get(key, "?")) for key in _NAMES[:3] if key == "method" or key in differ]
        # Fields differ from method to method anyway; only those that tell runs of the same names apart are of interest.
        twins = [other for other in values if all(other.get(name) == each.get(name) for name in _NAMES)]
        apart = [key for key in differ if key not in _NAMES and len({str(twin.get(key)) for twin in twins}) > 1]
        others = [f"{key.rpartition('.')[2]}={each[key]}" for key in apart if key in each]
        found.append(" ".join([*words, *others, f"s{each.get('seed', '?')}"]) if each else run.run)
    return found


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


def _look(folder: Path, name: str, recipe: Mapping[str, Any]) -> Watched:
    path = folder / name
    seen = Watched(name, recipe, epochs=recipe.get("epochs"))
    beat = _read(path / PROGRESS)
    metrics = _rows(path / "metrics.csv")
    seen.seconds = sum(_number(row.get("seconds")) for row in _rows(path / "timing.csv"))
    if metrics:
        last = metrics[-1]
        seen.phase, seen.epoch = str(last.get("phase")), int(_number(last.get("epoch")))
        seen.validation_accuracies = _exits(last, "validation_accuracy_")
        seen.train_losses = _exits(last, "train_loss_")
        seen.fraction = min(len(metrics) / seen.epochs, 1.0) if seen.epochs else 0.0
    if beat:
        seen.phase, seen.epoch, seen.epochs = str(beat.get("phase")), beat.get("epoch", 0), beat.get("epochs")
        seen.fraction, seen.train_losses = _number(beat.get("fraction")), beat.get("losses") or seen.train_losses
    results = _read(path / RESULTS)
    if results:
        seen.state, seen.fraction, seen.test_accuracies = "finished", 1.0, results.get("test") or []
        seen.phase, seen.epoch, seen.epochs = "", len(metrics), len(metrics)
        return seen
    seen.state, seen.note = _state(folder, path, beat, seen.seconds / len(metrics) if metrics else 0.0)
    if seen.state == "running":
        seen.seconds_left = beat.get("seconds_left")
    return seen


def _state(folder: Path, path: Path, beat: Mapping[str, Any], epoch_seconds: float) -> tuple[str, str]:
    """Tell the state of a run that is not finished, and why."""
    failure = folder / FAILURES / f"{path.name}.json"
    reason = str(_read(failure).get("reason", ""))
    if not (path / "recipe.json").is_file():
        return ("failed", reason) if reason else ("waiting", "")
    heard = max(_number(beat.get("when")), _changed(path))
    if reason and _changed(failure) >= heard:
        return "failed", reason
    silent = time.time() - heard
    if silent < _FRESH and not beat:  # it is being made, and nobody holds it yet
        return "running", ""
    # A lock is only sure to be seen on the machine that holds it.
    if beat.get("host", platform.node()) == platform.node() and not RunFolder.is_held(path):
        return ("failed", reason) if reason else ("stalled", "nobody trains it; start the same command again")
    if silent > max(_PATIENCE, 3 * epoch_seconds):
        return "stalled", f"nothing was heard for {round(silent / 60)} min"
    return "running", ""


def _read(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing while it is not there, not whole, or no object."""
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
