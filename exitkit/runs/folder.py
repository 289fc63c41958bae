"""Run folders: the recipe, records, weights and outputs of a run, in one folder that needs nothing else.

recipe.json          the resolved recipe        environment.json   versions, device, when
split.safetensors    train, validation, test    metrics.csv        losses and accuracies, epoch by epoch
images.csv.gz        the image files and their classes, for data sets of files (see data/inventory.py)
checkpoint.pt        the training state         timing.csv         seconds and peak memory per epoch
trunk-*.safetensors  the trunk of that state, if its phase keeps it fixed (see training/checkpoint.py)
progress.json        progress, written every few seconds during training (see training/progress.py)
tensorboard/         the metrics as a TensorBoard log, if requested (see training/tensorboard.py)
learned.json         tables that the method learned besides the network, if any (see LearnedTable)
probes.safetensors   measurements on one fixed batch, if requested (see training/probe.py)
features/            the features of a frozen trunk, while its heads are trained (see training/features.py)
weights.safetensors  the trained network        cost.json          multiply-adds and parameters per exit
outputs-validation.safetensors, outputs-test.safetensors           logits [N, K, C], labels [N], indices [N]
embeddings-validation.safetensors, embeddings-test.safetensors     embedding_1 [N, d_1], ... of each exit, if requested
curvature.safetensors  of each exit's last layer on the training images, if requested (see runs/embeddings.py)
latency.json         milliseconds until each exit's prediction, if measured (see benchmarks/commands/bench.py)
classes.csv          images and correct predictions per class and exit (see runs/classes.py)
results.json         accuracy of each exit; written last, so that a folder with it is a finished run
"""

from __future__ import annotations

import contextlib
import glob
import shutil
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from exitkit.errors import DamagedError, HeldError, UserError, unknown
from exitkit.escaping import counted
from exitkit.files import (
    acquire,
    disk_error,
    drafted,
    exists,
    given_path,
    load_arrays,
    make_folder,
    owner,
    read_json,
    remove_leftovers,
    write_json,
)
from exitkit.runs.formats import (
    Environment,
    Latency,
    Results,
    check_outputs,
    check_probes,
    read_checked,
    read_costs,
    read_learned,
    read_table,
)
from exitkit.runs.recipe import ResolvedRecipe, flat_identity

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from exitkit.runs.classes import ClassHits

RESULTS = "results.json"
METRICS = "metrics.csv"
WEIGHTS = "weights.safetensors"
SPLIT = "split.safetensors"
IMAGES = "images.csv.gz"
PROBES = "probes.safetensors"
CURVATURE = "curvature.safetensors"
LEARNED = "learned.json"
LATENCY = "latency.json"
CLASSES = "classes.csv"
DIAGNOSTICS = "diagnostics"
FEATURES = "features"
_LOCK = "run.lock"
_LOCK_PATIENCE = 15.0  # seconds; the lock of a killed process is released at once, that of a worker soon after


def _check_part(part: str) -> None:
    """Raise UserError if a part is not one whose outputs are stored."""
    if part not in ("validation", "test"):
        raise unknown("part", part, ("validation", "test"))


class RunFolder:
    """One run's folder.

    Args:
        path: the folder.

    Raises:
        UserError: the folder does not exist, or is not a run's.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = given_path("run", path)
        if self.path.name in ("", ".."):  # the run has the name of its folder
            self.path = self.path.resolve()
        if not (self.path / "recipe.json").is_file():
            what = "holds no run (no recipe.json)" if self.path.is_dir() else absence(self.path)
            inside, beside = (
                [run.parent.name for run in sorted(place.glob("[!.]*/recipe.json"))]
                for place in (self.path, self.path.parent)
            )
            near = get_close_matches(self.path.name, beside)
            if inside:
                hint = f"; it contains {counted(len(inside), 'run')}, such as {self.path / inside[0]}"
            elif near:
                hint = f"; did you mean {self.path.parent / near[0]}?"
            else:
                hint = "; expected one that `exitkit train` made"
            raise UserError(f"run folder {self.path} {what}{hint}")

    @classmethod
    def of(cls, run: RunFolder | str | Path) -> RunFolder:
        """Return a run, given as a `RunFolder` or by its path."""
        return run if isinstance(run, RunFolder) else cls(run)

    @classmethod
    def create(cls, out: Path, recipe: ResolvedRecipe, writers: Mapping[str, Callable[[Path], None]]) -> RunFolder:
        """Make the folder of a new run, with its recipe and the files of `writers` {name: function of the path}.

        The folder is complete or does not appear; if another process has made it first, that one is returned.
        """
        make_folder(out)
        path = out / recipe.id
        try:
            with drafted(path) as draft:
                for name, write in writers.items():
                    write(draft / name)
                write_json(draft / "recipe.json", recipe.model_dump(mode="json"))
                draft.rename(path)
        except (OSError, UserError) as error:
            if not exists(path):
                raise error if isinstance(error, UserError) else disk_error(path, error) from None
        return cls(path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run's lock, and delete what a killed process was writing; the lock ends with the process.

        Raises:
            UserError: another process holds the lock, the folder is gone, or its file system has no locks.
        """
        try:
            lock = FileLock(self.path / _LOCK, timeout=_LOCK_PATIENCE)
            acquire(lock)
        except Timeout:
            raise HeldError(
                f"run {self.path} is in use by another process; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise disk_error(self.path, error) from None
        try:
            remove_leftovers(self.path)
            # Incomplete drafts of this folder; a process that still writes one will return this folder instead.
            for draft in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.part"):
                shutil.rmtree(draft, ignore_errors=True)
            yield
        finally:
            lock.release()

    @staticmethod
    def is_held(path: Path) -> bool:
        """Whether another process holds the lock of the run at `path`, without waiting."""
        if not exists(path / _LOCK):
            return False
        lock = FileLock(path / _LOCK, timeout=0)
        try:
            lock.acquire()
        except (Timeout, OSError):
            return True
        lock.release()
        return False

    @property
    def recipe(self) -> ResolvedRecipe:
        """The resolved recipe."""
        values = read_json(self.path / "recipe.json")
        if not isinstance(values, dict):
            raise DamagedError(f"{self.path / 'recipe.json'} is damaged; expected a table of keys")
        try:
            return ResolvedRecipe.make(**values)
        except (UserError, TypeError) as error:
            raise DamagedError(f"{self.path / 'recipe.json'} is damaged: {error}") from None

    @property
    def identity(self) -> dict[str, str]:
        """The run's identity as a flat dictionary: {key or `method.field`, `backbone.field`, `dataset.field`: JSON}."""
        return flat_identity(self.recipe)

    @staticmethod
    def is_finished(path: Path) -> bool:
        """Whether the folder `path` contains a finished run."""
        return exists(path / RESULTS)

    @property
    def finished(self) -> bool:
        """Whether the run is trained and evaluated."""
        return self.is_finished(self.path)

    @property
    def name(self) -> str | None:
        """Name of the run when it began, as stored in its split and in all its files of tensors."""
        return owner(self.path / SPLIT)

    def own(self, file: str) -> Path:
        """Return the path of one of the run's files of tensors.

        A file that names no run is accepted, so that weights can be edited by hand.

        Raises:
            UserError: the file was copied from another run, or is damaged.
        """
        path = self.path / file
        name, file_owner = self.name, owner(path)
        if name and file_owner and name != file_owner:
            raise DamagedError(f"{path} is of run {file_owner}, and {SPLIT} of run {name}; restore the run's own file")
        return path

    def epochs_done(self) -> int:
        """Return the number of trained epochs, over all phases."""
        metrics = self.path / METRICS
        if not metrics.exists():
            return 0
        try:
            return max(len(metrics.read_text(encoding="utf-8", errors="replace").splitlines()) - 1, 0)
        except OSError as error:
            raise UserError(f"{metrics} can't be read: {error.strerror}") from None

    def environment(self) -> dict[str, Any]:
        """Return the versions and the device that the run began with."""
        environment: dict[str, Any] = read_checked(self.path / "environment.json", Environment)
        return environment

    def results(self) -> dict[str, Any]:
        """Return {"validation": accuracies, "test": accuracies}, each with one percentage per exit.

        For images in files also `images`, their digest, and `left_out`, messages about images that were not evaluated.

        Raises:
            UserError: the run is not finished (the message has the command that resumes it), or is damaged.
        """
        if not self.finished:
            raise UserError(
                f"run {self.path} is not finished; resume it with: exitkit train --recipe "
                f"{self.path / 'recipe.json'} --out {self.path.parent} --resume"
            )
        results: dict[str, Any] = read_checked(self.path / RESULTS, Results)
        exits = len(self.costs())
        if any(len(results[part]) != exits for part in ("validation", "test")):
            raise DamagedError(
                f"{self.path / RESULTS} has another number of exits than cost.json; evaluate the run again"
            )
        return results

    def costs(self) -> list[dict[str, int]]:
        """Return one dictionary per exit: exit (from 1), papers, macs, pruned, params; see `exitkit.networks.ExitCost`.

        Raises:
            UserError: the run has no costs, or they are damaged.
        """
        return read_costs(self.path / "cost.json")

    def metrics(self) -> pd.DataFrame:
        """Return one row per epoch: phase, epoch (within it), lr, losses and accuracies (percent) of every exit.

        Raises:
            UserError: no epoch has been trained, or the table is damaged.
        """
        metrics = read_table(self.path / METRICS, ["phase"], ["epoch", "lr"])
        if metrics.empty:
            raise DamagedError(f"{self.path / METRICS} is damaged (it has no epoch)")
        return metrics

    def latency(self) -> list[float]:
        """Return the milliseconds until the prediction of each exit, as measured by `exitkit bench`.

        Raises:
            UserError: they were not measured.
        """
        path = self.path / LATENCY
        if not path.exists():
            raise UserError(f"run {self.path} has no measured latency; measure it with: exitkit bench {self.path}")
        milliseconds: list[float] = read_checked(path, Latency)["milliseconds"]
        if len(milliseconds) != len(self.costs()):
            raise UserError(f"{path} has another number of exits than cost.json; measure the run again")
        return milliseconds

    def latency_settings(self) -> dict[str, Any]:
        """Return how `exitkit bench` measured the latency: engine, mode, batch_size, boundary, device and threads."""
        facts = read_checked(self.path / LATENCY, dict[str, Any])
        engines = {"engine": next(iter(facts["engines"]))} if facts.get("engines") else {}
        keys = ("mode", "batch_size", "boundary", "device", "threads")
        return engines | {key: facts[key] for key in keys if key in facts}

    def learned(self) -> list[dict[str, Any]]:
        """Return the tables that the method learned besides the network: phase, title, rows, columns and values."""
        return read_learned(self.path / LEARNED) if exists(self.path / LEARNED) else []

    def training_cost(self) -> dict[str, float]:
        """Return the seconds of training, over all epochs, and its peak memory in MiB (see `exitkit.engine.memory`)."""
        timing = read_table(self.path / "timing.csv", ["phase"], ["seconds", "peak_mib"])
        # An epoch without a timing, after a kill, counts with the mean of its phase.
        mean = timing.groupby("phase").seconds.mean()
        epochs = self.metrics().groupby("phase").size()
        return {"seconds": float((mean * epochs).sum()), "memory_mib": float(timing.peak_mib.max())}

    def probes(self) -> dict[str, np.ndarray]:
        """Return the measurements of `exitkit.training.probe.probe`, stacked over T probes, with `epoch` [T], or {}."""
        path = self.own(PROBES)
        if not path.exists():
            return {}
        arrays = load_arrays(path)
        check_probes(path, arrays, self.epochs_done())
        return arrays

    def training_images(self) -> int:
        """Return the number of images that the run was trained on, or 0 if its split is missing."""
        return len(load_arrays(self.path / SPLIT).get("train", ())) if exists(self.path / SPLIT) else 0

    def classes(self, part: str) -> ClassHits:
        """Return the images [C] and the correct predictions [K, C] of part `validation` or `test`.

        Raises:
            UserError: the run is not finished, or its table of classes is damaged.
        """
        # Imported when used: numpy takes a tenth of a second to load.
        from exitkit.runs.classes import ClassHits, read_classes

        _check_part(part)
        path = self.path / CLASSES
        if exists(path):
            return read_classes(path, part, len(self.costs()))
        outputs = self.outputs(part)  # runs of earlier releases
        return ClassHits.count(outputs["logits"], outputs["labels"])

    def class_names(self) -> list[str]:
        """Return the names of the classes; their numbers for runs of earlier releases."""
        about = self.environment()
        classes = about.get("num_classes", 0)
        names: list[str] = about.get("class_names") or [str(number) for number in range(classes)]
        if classes and len(names) != classes:
            raise DamagedError(f"{self.path / 'environment.json'} has {len(names)} class names; expected {classes}")
        return names

    def outputs(self, part: str) -> dict[str, np.ndarray]:
        """Return the outputs of all exits: logits [N, K, C], labels [N], indices [N] of part `validation` or `test`.

        Raises:
            UserError: the run is not finished, or its outputs are damaged or of another run.
        """
        _check_part(part)
        path = self.own(f"outputs-{part}.safetensors")
        arrays = load_arrays(path)
        check_outputs(path, arrays, self.results()[part])
        return arrays

    def has_embeddings(self) -> bool:
        """Whether the last evaluation stored the embeddings of the exits."""
        return exists(self.path / CURVATURE)

    def embeddings(self, part: str) -> list[np.ndarray]:
        """Return the embeddings of each exit for the images of `outputs`, [N, d_k] each.

        Raises:
            UserError: they were not stored, or are damaged.
        """
        self._check_embeddings()
        path = self.own(embeddings_file(part))
        arrays, outputs = load_arrays(path), self.outputs(part)["logits"]
        found = [arrays.get(f"embedding_{number}") for number in range(1, outputs.shape[1] + 1)]
        if any(array is None or array.ndim != 2 or len(array) != len(outputs) for array in found):
            raise DamagedError(f"{path} does not fit the outputs of the run; evaluate it again with --embeddings")
        return [array for array in found if array is not None]

    def curvature(self) -> dict[str, np.ndarray]:
        """Return the curvature of each exit's last layer, see `exitkit.runs.embeddings`.

        Raises:
            UserError: it was not stored, or is damaged.
        """
        self._check_embeddings()
        path = self.own(CURVATURE)
        arrays = load_arrays(path)
        exits = range(1, len(self.costs()) + 1)
        missing = {"images", *(f"{kind}_{number}" for kind in ("outputs", "features") for number in exits)}
        if missing := missing - arrays.keys():
            raise DamagedError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
        return arrays

    def _check_embeddings(self) -> None:
        if not self.has_embeddings():
            raise UserError(
                f"run {self.path} has no stored embeddings; store them with: exitkit evaluate {self.path} --embeddings"
            )


def embeddings_file(part: str) -> str:
    """Return the name of the file of embeddings of part `validation` or `test`."""
    return f"embeddings-{part}.safetensors"


def absence(path: Path) -> str:
    """Return why a path is not a folder."""
    return "is a file" if exists(path) else "does not exist"


def nearest_unfinished(recipe: ResolvedRecipe, out: Path) -> str:
    """Describe the unfinished run in `out` of the same method, backbone, data set and seed with the fewest differences.

    For an error message; "" if there is none.
    """
    descriptions: list[tuple[int, str]] = []
    expected = flat_identity(recipe)
    for path in sorted(out.glob("[!.]*/recipe.json")):
        try:
            run = RunFolder(path.parent)
            identity = run.identity
        except UserError:
            continue
        if run.finished or any(identity[key] != expected[key] for key in ("method", "backbone", "dataset", "seed")):
            continue
        changed = sorted(key for key in expected.keys() | identity.keys() if expected.get(key) != identity.get(key))
        facts = ", ".join(f"{key}={identity.get(key)} instead of {expected.get(key)}" for key in changed[:3])
        descriptions.append((len(changed), f"{path.parent} has {facts}"))
    return min(descriptions)[1] if descriptions else ""
