"""The state of the runs of a folder, read from their files; nothing is written, and torch is not imported."""

from __future__ import annotations

import contextlib
import csv
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field

# Before Python 3.12 pydantic takes no other.
from typing_extensions import TypedDict

from exitkit.benchmarks.campaign.record import FAILURES, plans
from exitkit.errors import DamagedError
from exitkit.files import checked, exists, read_json
from exitkit.runs.folder import METRICS, RESULTS, RunFolder
from exitkit.training.progress import INTERVAL, PROGRESS

STATES = ("running", "stalled", "failed", "waiting", "finished")
"""In the order in which `exitkit watch` shows them."""

_FRESH = 3 * INTERVAL  # seconds after a run's folder was created during which its lock is not checked
_PATIENCE = 120.0  # seconds; no progress is reported at the start and during validation
_NAMES = ("method", "backbone", "dataset", "seed")


Count = Annotated[int, Field(ge=0, le=10**18)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1 + 1e-6, allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class _Recipe(TypedDict):
    """What is shown of a recipe; other keys are not checked here."""

    method: str
    backbone: str
    dataset: str
    seed: Count
    epochs: NotRequired[Count | None]
    method_settings: NotRequired[dict[str, Any]]
    backbone_settings: NotRequired[dict[str, Any]]
    dataset_settings: NotRequired[dict[str, Any]]


class _PlannedRun(TypedDict):
    run: Annotated[str, Field(pattern=r"^[^/\\]+$", max_length=255)]
    recipe: NotRequired[_Recipe]


class _Plan(TypedDict, total=False):
    runs: list[_PlannedRun]


class _Progress(TypedDict, total=False):
    """The content of the file that `exitkit.training.progress` writes."""

    phase: str
    epoch: Count
    epochs: Count
    fraction: Share
    rate: Number | None
    losses: list[Number | None]
    accuracies: list[Number | None]
    seconds_left: Annotated[float, Field(ge=-1, le=10**10)] | None
    host: str
    when: Number


class _Results(TypedDict):
    validation: NotRequired[list[Percent]]
    test: list[Percent]


class _Failure(TypedDict, total=False):
    reason: str


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
    """Return the planned and started runs of a folder, planned ones first.

    Files that are missing leave default values. A run with a damaged file has failed, and its note names the file.
    """
    recipes: dict[str, Mapping[str, Any]] = {}
    for plan in plans(folder):
        with contextlib.suppress(DamagedError):
            for run in _read(plan, _Plan).get("runs", ()):
                recipes[run["run"]] = run.get("recipe", {})
    for path in sorted(folder.glob("[!.]*/recipe.json")):
        recipes.setdefault(path.parent.name, {})
    return [_checked(folder, name, recipe) for name, recipe in recipes.items()]


def _checked(folder: Path, name: str, planned: Mapping[str, Any]) -> Watched:
    try:
        recipe = _read(folder / name / "recipe.json", _Recipe)
        return _watched(folder, name, planned or recipe)
    except DamagedError as error:
        return Watched(name, planned, "failed", note=str(error))


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
    progress = _read(path / PROGRESS, _Progress)
    metrics = _rows(path / METRICS)
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
        losses = [math.nan if loss is None else loss for loss in progress.get("losses", ())]
        watched.train_losses = losses or watched.train_losses
    results = _read(path / RESULTS, _Results)
    if results:
        if exists(path / METRICS) and not metrics:
            raise DamagedError(f"{path / METRICS} is damaged (it has no epoch)")
        watched.state, watched.fraction, watched.test_accuracies = "finished", 1.0, results["test"]
        watched.phase, watched.epoch, watched.epochs = "", len(metrics), len(metrics)
        return watched
    watched.state, watched.note = _state(folder, path, progress, watched.seconds / len(metrics) if metrics else 0.0)
    if watched.state == "running":
        watched.seconds_left = progress.get("seconds_left")
    return watched


def _state(folder: Path, path: Path, progress: Mapping[str, Any], epoch_seconds: float) -> tuple[str, str]:
    """Return the state of an unfinished run, and the reason."""
    failure = folder / FAILURES / f"{path.name}.json"
    reason = str(_read(failure, _Failure).get("reason", ""))
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


def _read(path: Path, kind: Any) -> dict[str, Any]:
    """Return the object of type `kind` in a JSON file; {} if the file is missing.

    Raises:
        DamagedError: the content has another type.
    """
    if not exists(path):
        return {}
    content: dict[str, Any] = checked(path, kind, read_json(path))
    return content


def _rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table of epochs; [] if the file is missing.

    Raises:
        DamagedError: it is no such table: a column is missing, a row has another length, or a value is no number.
    """
    if not exists(path):
        return []
    try:
        reader = csv.DictReader(path.read_text(encoding="utf-8").splitlines(), restval="")
        rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise DamagedError(f"{path} can't be read ({error})") from None
    for name in ("phase", "epoch"):
        if name not in (reader.fieldnames or ()):
            raise DamagedError(f"{path} is damaged (it lacks the column {name})")
    for line, row in enumerate(rows, 2):
        for name, value in row.items():
            if name != "phase" and not _is_number(value):  # what is beyond the columns is a list named None
                raise DamagedError(f"{path} is damaged (line {line}: {name or 'one value more'} is {value!r:.60})")
    return rows


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _exits(row: Mapping[str, str], prefix: str) -> list[float]:
    return [_number(value) for key, value in row.items() if key and key.startswith(prefix)]


def _number(value: Any) -> float:
    """Return a finite number that a table or file contains, otherwise 0."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if math.isfinite(number) else 0.0


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
