"""A run is a folder, and the folder is enough: what it was, how it went, and what every exit said of every image.

recipe.json          the resolved recipe        environment.json   versions, device, when
split.safetensors    train, validation, test    metrics.csv        losses and accuracies, epoch by epoch
checkpoint.pt        where training stands      timing.csv         seconds and peak memory an epoch
progress.json        where it is, every few seconds while it trains (see training/progress.py)
tensorboard/         the metrics as a TensorBoard log, if asked for (see training/tensorboard.py)
learned.json         what the method learned besides the network, if anything (see LearnedTable)
probes.safetensors   what was seen on one fixed batch, if asked for (see training/probe.py)
weights.safetensors  the trained network        cost.json          multiply-adds and parameters an exit
outputs-validation.safetensors, outputs-test.safetensors           logits [N, K, C], labels [N], indices [N]
latency.json         milliseconds until each exit answers, if measured (see benchmarks/commands/bench.py)
results.json         accuracy of each exit; written last: a folder that has it is finished
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

from exitkit.errors import HeldError, UserError
from exitkit.files import disk_error, drafted, exists, load_arrays, make_folder, owner, read_json, write_json
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

RESULTS = "results.json"
WEIGHTS = "weights.safetensors"
SPLIT = "split.safetensors"
PROBES = "probes.safetensors"
LEARNED = "learned.json"
LATENCY = "latency.json"
DIAGNOSTICS = "diagnostics"
_LOCK = "run.lock"
_LOCK_PATIENCE = 15.0  # seconds; a killed process lets its lock go at once, a dying worker within moments


class RunFolder:
    """One run's folder.

    Args:
        path: the folder.

    Raises:
        UserError: it is not there, or holds no run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "recipe.json").is_file():
            what = "holds no run (no recipe.json)" if self.path.is_dir() else absence(self.path)
            inside, beside = (
                [run.parent.name for run in sorted(place.glob("[!.]*/recipe.json"))]
                for place in (self.path, self.path.parent)
            )
            near = get_close_matches(self.path.name, beside)
            if inside:
                hint = f"; there are {len(inside)} in it, such as {self.path / inside[0]}"
            elif near:
                hint = f"; did you mean {self.path.parent / near[0]}?"
            else:
                hint = "; expected one that `exitkit train` made"
            raise UserError(f"run folder {self.path} {what}{hint}")

    @classmethod
    def of(cls, run: RunFolder | str | Path) -> RunFolder:
        """Return a run, given itself or its folder."""
        return run if isinstance(run, RunFolder) else cls(run)

    @classmethod
    def create(cls, out: Path, recipe: ResolvedRecipe, writers: Mapping[str, Callable[[Path], None]]) -> RunFolder:
        """Make the folder of a new run with its recipe and what `writers` {name: function of the path} write.

        The folder appears whole or not at all; where another process was faster, its folder is the one.
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
        """Hold the run for training, and clear away what a killed process was writing; the hold goes with its process.

        Raises:
            UserError: another process holds it.
        """
        try:
            lock = FileLock(self.path / _LOCK, timeout=_LOCK_PATIENCE)
            lock.acquire()
        except Timeout:
            raise HeldError(
                f"run {self.path} is being trained by another process; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise disk_error(self.path, error) from None
        try:
            for leftover in self.path.glob(".*.part"):
                leftover.unlink(missing_ok=True)
            # Folders of this run that never became it; who is still at one will find this one in its place.
            for draft in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.part"):
                shutil.rmtree(draft, ignore_errors=True)
            yield
        finally:
            lock.release()

    @staticmethod
    def is_held(path: Path) -> bool:
        """Whether another process is at the run there, as far as can be told without waiting."""
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
            raise UserError(f"{self.path / 'recipe.json'} is damaged; expected a table of keys")
        try:
            return ResolvedRecipe.make(**values)
        except (UserError, TypeError) as error:
            raise UserError(f"{self.path / 'recipe.json'} is damaged: {error}") from None

    @property
    def identity(self) -> dict[str, str]:
        """What makes the run this run, flat: {key, or `method.field`, `backbone.field`, `dataset.field`: JSON}."""
        return flat_identity(self.recipe)

    @staticmethod
    def is_finished(path: Path) -> bool:
        """Whether a finished run lies there."""
        return exists(path / RESULTS)

    @property
    def finished(self) -> bool:
        """Whether it was trained and evaluated."""
        return self.is_finished(self.path)

    @property
    def name(self) -> str | None:
        """What the run was called when it began; its split says so, and every file of tensors after it."""
        return owner(self.path / SPLIT)

    def own(self, file: str) -> Path:
        """Return the path of one of the run's files of tensors.

        One that names no run may be anybody's: whoever edits weights by hand knows what they do.

        Raises:
            UserError: it was copied here from another run, or is damaged.
        """
        path = self.path / file
        ours, theirs = self.name, owner(path)
        if ours and theirs and ours != theirs:
            raise UserError(f"{path} is of run {theirs}, and {SPLIT} of run {ours}; put the run's own file back")
        return path

    def epochs_done(self) -> int:
        """How many epochs, over all phases, have been trained."""
        metrics = self.path / "metrics.csv"
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
        """Return {"validation": accuracies, "test": accuracies}, each one percentage an exit."""
        if not self.finished:
            raise UserError(
                f"run {self.path} is not finished; go on with: exitkit train --recipe "
                f"{self.path / 'recipe.json'} --out {self.path.parent} --resume"
            )
        results: dict[str, Any] = read_checked(self.path / RESULTS, Results)
        exits = len(self.costs())
        if any(len(results[part]) != exits for part in ("validation", "test")):
            raise UserError(
                f"{self.path / RESULTS} is of another number of exits than cost.json; evaluate the run again"
            )
        return results

    def costs(self) -> list[dict[str, int]]:
        """Return one dict an exit: exit (from 1), papers, macs (multiply-adds of one image), params."""
        return read_costs(self.path / "cost.json")

    def metrics(self) -> pd.DataFrame:
        """Return one row an epoch: phase, epoch (within it), lr, losses and accuracies (percent) of every exit."""
        metrics = read_table(self.path / "metrics.csv", ["phase"], ["epoch", "lr"])
        if metrics.empty:
            raise UserError(f"{self.path / 'metrics.csv'} is damaged (it has no epoch)")
        return metrics

    def latency(self) -> list[float]:
        """Return the milliseconds until each exit answers, as `exitkit bench` measured them.

        Raises:
            UserError: it did not.
        """
        path = self.path / LATENCY
        if not path.exists():
            raise UserError(f"run {self.path} has no measured latency; measure it with: exitkit bench {self.path}")
        milliseconds: list[float] = read_checked(path, Latency)["milliseconds"]
        if len(milliseconds) != len(self.costs()):
            raise UserError(f"{path} is of another number of exits than cost.json; measure the run again")
        return milliseconds

    def learned(self) -> list[dict[str, Any]]:
        """Return what the method learned besides the network: tables of a phase, title, rows, columns and values."""
        return read_learned(self.path / LEARNED) if exists(self.path / LEARNED) else []

    def training_cost(self) -> dict[str, float]:
        """Return the seconds that training took over all epochs, and its peak memory in MiB (see `exitkit.engine.memory`)."""
        timing = read_table(self.path / "timing.csv", ["phase"], ["seconds", "peak_mib"])
        # An epoch after which the process was killed may be missing: then it counts as the others of its phase do.
        mean = timing.groupby("phase").seconds.mean()
        epochs = self.metrics().groupby("phase").size()
        return {"seconds": float((mean * epochs).sum()), "memory_mib": float(timing.peak_mib.max())}

    def probes(self) -> dict[str, np.ndarray]:
        """Return what `exitkit.training.probe.probe` measured, each stacked over time, with `epoch` [T]; empty without probes."""
        path = self.own(PROBES)
        if not path.exists():
            return {}
        arrays = load_arrays(path)
        check_probes(path, arrays, self.epochs_done())
        return arrays

    def training_images(self) -> int:
        """Return how many images the run was trained on, 0 where its split is not there."""
        return len(load_arrays(self.path / SPLIT).get("train", ())) if exists(self.path / SPLIT) else 0

    def outputs(self, part: str) -> dict[str, np.ndarray]:
        """Return what every exit said: logits [N, K, C], labels [N], indices [N] of part `validation` or `test`."""
        path = self.own(f"outputs-{part}.safetensors")
        arrays = load_arrays(path)
        check_outputs(path, arrays, self.results()[part])
        return arrays


def absence(path: Path) -> str:
    """Say why there is no folder at a path."""
    return "is a file" if exists(path) else "does not exist"


def unfinished_twin(recipe: ResolvedRecipe, out: Path) -> str:
    """Say how an unfinished run in `out` of the same method, backbone, data set and seed differs, nearest first.

    For an error message; "" if there is none.
    """
    told: list[tuple[int, str]] = []
    wanted = flat_identity(recipe)
    for path in sorted(out.glob("[!.]*/recipe.json")):
        try:
            run = RunFolder(path.parent)
            there = run.identity
        except UserError:
            continue
        if run.finished or any(there[key] != wanted[key] for key in ("method", "backbone", "dataset", "seed")):
            continue
        changed = sorted(key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key))
        facts = ", ".join(f"{key}={there.get(key)} there, {wanted.get(key)} here" for key in changed[:3])
        told.append((len(changed), f"{path.parent} has {facts}"))
    return min(told)[1] if told else ""
