"""Launchers of a campaign: train runs in this process, in worker processes, or on Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from exitkit import plugins
from exitkit.benchmarks.campaign.worker import outcome
from exitkit.errors import Note, UserError, unknown
from exitkit.files import SHARED_IMAGES

if TYPE_CHECKING:
    from exitkit.runs.recipe import ResolvedRecipe

LAUNCHERS = ("processes", "here", "slurm", "submitit-local")
_USABLE = 0.9  # share of the free memory that runs may use
_LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


@dataclass(frozen=True)
class Event:
    """An event of the run with number `index`.

    Kinds: "begun", "progress", "done", "failed" (`facts` has a message), "held" (another process trains the run).
    """

    index: int
    kind: str
    facts: Mapping[str, Any]


class Launcher(Protocol):
    """Trains runs, `slots` in parallel."""

    slots: int

    def start(self, index: int, recipe: ResolvedRecipe, out: Path) -> None:
        """Start a run."""

    def wait(self) -> Event:
        """Wait for the next event of the started runs and return it."""

    def close(self) -> None:
        """Stop all running runs; they can be resumed from their checkpoints."""


def make_launcher(name: str, jobs: int, recipe: ResolvedRecipe, out: Path, slurm: Mapping[str, str]) -> Launcher:
    """Return a launcher by name.

    Args:
        name: one of `LAUNCHERS`.
        jobs: number of parallel runs.
        recipe: any recipe of the campaign; its number of threads is used.
        out: folder for the run folders.
        slurm: parameters of submitit (`timeout_min=60`, `slurm_partition=gpu`).

    Raises:
        UserError: the name is unknown, or submitit is not installed.
    """
    if name not in LAUNCHERS:
        raise unknown("launcher", name, LAUNCHERS)
    if slurm and name not in ("slurm", "submitit-local"):
        raise UserError(f"--slurm needs --launcher slurm, got {name}")
    if name == "here":
        return Here()
    if name == "processes":
        return Processes(jobs, recipe.threads)
    return Submitit(name, jobs, out, slurm)


def check_importable(recipes: Iterable[ResolvedRecipe]) -> None:
    """Check that other processes can find the methods, networks and data sets of recipes.

    Raises:
        UserError: one was registered in a notebook or an interactive session.
    """
    for recipe in recipes:
        for kind in plugins.KINDS:
            plugins.check_importable(kind, getattr(recipe, kind))


def default_jobs(device: str, threads: int) -> int:
    """Return the number of parallel runs: one per GPU, or the number of cores divided by the threads per run."""
    # Imported when used: the command line's help must not load torch.
    import torch

    from exitkit.engine.devices import choose_device

    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.device_count()
    if choose_device(device).type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // threads, 1)


def fit_memory(launcher: Launcher, peaks: Sequence[float], *, fixed: bool) -> None:
    """Limit the parallel runs of worker processes to those that fit into the memory of this machine.

    Args:
        launcher: the launcher; only `Processes` is limited.
        peaks: estimated peak memory of each run in MiB.
        fixed: keep the number of parallel runs, and only warn.
    """
    # Imported when used: the command line's help must not load torch.
    from exitkit.engine.memory import available_mib

    free = available_mib()
    if not isinstance(launcher, Processes) or not peaks or free != free:
        return
    fitting, parallel = max(int(_USABLE * free / max(peaks)), 1), min(launcher.slots, len(peaks))
    if parallel <= fitting:
        return
    about = f"a run needs about {max(peaks) / 1024:.1f} GiB, and {free / 1024:.1f} GiB are free"
    if fixed:
        message = f"{about}: {parallel} runs at a time may not fit; expected at most --jobs {fitting}"
    else:
        launcher.slots = fitting
        message = f"{about}: {fitting} at a time"
    warnings.warn(Note(message), stacklevel=2)


class Here:
    """Trains one run after the other in this process, for debugging."""

    slots = 1

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._next: Callable[[], None] | None = None
        self.on_progress: Callable[[Event], None] = lambda event: None

    def start(self, index: int, recipe: ResolvedRecipe, out: Path) -> None:
        """See `Launcher`."""

        def train() -> None:
            def report(kind: str, **facts: Any) -> None:
                (self._events.put if kind != "progress" else self.on_progress)(Event(index, kind, facts))

            outcome({"recipe": recipe.model_dump(mode="json"), "out": str(out)}, report)

        self._next = train

    def wait(self) -> Event:
        """See `Launcher`."""
        assert self._next is not None
        self._next()
        return self._events.get()

    def close(self) -> None:
        """See `Launcher`."""


class _Worker:
    """A worker process and the thread that reads its events; `images` is the folder of the shared images."""

    def __init__(
        self,
        number: int,
        threads: int,
        gpu: str | None,
        images: str,
        answers: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]],
    ) -> None:
        self.index, self.number = -1, number
        # Remove variables of a distributed launcher: each run here is a single process.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHED)}
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), SHARED_IMAGES: images}
        if gpu is not None:  # the recipe then needs no GPU index of this machine
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        self.process = subprocess.Popen(
            [sys.executable, "-m", "exitkit.benchmarks.campaign.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the campaign only, which ends its workers
        )
        threading.Thread(target=self._listen, args=(answers,), daemon=True).start()

    def _listen(self, answers: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                with contextlib.suppress(ValueError):  # the last line of a killed worker may be incomplete
                    answers.put((self, json.loads(line)))
        finally:
            answers.put((self, None))

    def give(self, index: int, recipe: ResolvedRecipe, out: Path) -> None:
        """Send a run to the worker."""
        self.index = index
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the closed output of an ended worker is handled in `wait`
            self.process.stdin.write(json.dumps({"recipe": recipe.model_dump(mode="json"), "out": str(out)}) + "\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()


class Processes:
    """Trains runs in worker processes on this machine.

    Args:
        slots: number of workers.
        threads: CPU threads per worker.
    """

    def __init__(self, slots: int, threads: int) -> None:
        self.slots, self._threads = slots, threads
        self._images: tempfile.TemporaryDirectory[str] | None = None
        self._answers: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []

    def start(self, index: int, recipe: ResolvedRecipe, out: Path) -> None:
        """See `Launcher`; the first `slots` runs each start a worker."""
        if not self._idle:
            taken = {worker.number for worker in self._busy}
            number = next(n for n in range(self.slots) if n not in taken)
            gpu = gpu_of(number) if recipe.device in ("auto", "cuda") else None
            if self._images is None:
                self._images = tempfile.TemporaryDirectory(prefix="exitkit-images-", ignore_cleanup_errors=True)
            self._idle.append(_Worker(number, self._threads, gpu, self._images.name, self._answers))
        worker = self._idle.pop(0)
        self._busy.append(worker)
        worker.give(index, recipe, out)

    def wait(self) -> Event:
        """See `Launcher`; if a worker process ends, its run has failed and the worker is replaced."""
        while True:
            worker, answer = self._answers.get()
            if worker not in self._busy:
                if answer is None and worker in self._idle:
                    self._idle.remove(worker)
                continue
            if answer is None:
                self._busy.remove(worker)
                code = worker.process.wait()
                message = f"the worker process ended unexpectedly (exit code {code}; out of memory?)"
                return Event(worker.index, "failed", {"message": message})
            kind = answer.pop("event")
            if kind != "progress":
                self._busy.remove(worker)
                self._idle.append(worker)
            return Event(worker.index, kind, answer)

    def close(self) -> None:
        """See `Launcher`."""
        for worker in [*self._busy, *self._idle]:
            worker.end()
        if self._images is not None:
            self._images.cleanup()


def gpu_of(number: int) -> str | None:
    """Return the value of CUDA_VISIBLE_DEVICES for worker `number`; None without a GPU."""
    # Imported when used: the command line's help must not load torch.
    import torch

    if not torch.cuda.is_available():
        return None
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else list(map(str, range(torch.cuda.device_count())))
    return visible[number % len(visible)].strip()


class Submitit:
    """Submits runs with submitit: to Slurm as job arrays, or to local processes.

    Args:
        name: "slurm" or "submitit-local".
        slots: maximum number of parallel jobs.
        out: folder for the run folders; the logs of the jobs are written to its subfolder `slurm`.
        parameters: parameters of submitit's executor.

    Raises:
        UserError: submitit is not installed, or a parameter is unknown.
    """

    _POLL = 0.5

    def __init__(self, name: str, slots: int, out: Path, parameters: Mapping[str, str]) -> None:
        try:
            # Imported on use: submitit is optional.
            import submitit
        except ImportError:
            raise UserError(
                f"--launcher {name} needs submitit; install it with: pip install 'exitkit[slurm]'"
            ) from None
        self._name, self.slots = name, slots
        cluster = "slurm" if name == "slurm" else "local"
        known = {"timeout_min": 240, "slurm_array_parallelism": slots, "cpus_per_task": 1}
        values = known | {key: _number(text) for key, text in parameters.items()}
        try:
            with tempfile.TemporaryDirectory() as folder:  # an executor creates its folder before it checks parameters
                submitit.AutoExecutor(folder=folder, cluster=cluster).update_parameters(**values)
            # Only Slurm replaces %j by the job's number in every place.
            logs = out / "slurm" / "%j" if cluster == "slurm" else out / "slurm"
            self._executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        except (NameError, TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise UserError(f"--launcher {name}: {' '.join(str(error).split())}") from None
        self._executor.update_parameters(**values)
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self._jobs: dict[int, Any] = {}

    def start(self, index: int, recipe: ResolvedRecipe, out: Path) -> None:
        """See `Launcher`; the runs started between two waits become one job array."""
        request = {"recipe": recipe.model_dump(mode="json"), "out": str(out.resolve())}
        self._waiting.append((index, request))

    def wait(self) -> Event:
        """See `Launcher`."""
        if self._waiting:
            try:
                with self._executor.batch():
                    jobs = [(index, self._executor.submit(_train_in_job, request)) for index, request in self._waiting]
            except RuntimeError as error:  # the cluster refuses the jobs: submitit's FailedJobError
                raise UserError(f"--launcher {self._name}: {' '.join(str(error).split())}") from None
            self._jobs |= dict(jobs)
            self._waiting = []
        while True:
            for index, job in self._jobs.items():
                if job.done():
                    del self._jobs[index]
                    return Event(index, *_result(job))
            time.sleep(self._POLL)

    def close(self) -> None:
        """See `Launcher`."""
        for job in self._jobs.values():
            job.cancel()


def _number(text: str) -> int | float | str:
    """Return text as an int or float if it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _train_in_job(request: dict[str, Any]) -> list[Any]:
    """Train one run in a job, and return its last event."""
    events: list[Any] = []
    outcome(request, lambda kind, **facts: events.append([kind, facts]) if kind != "progress" else None)
    return list(events[-1])


def _result(job: Any) -> tuple[str, dict[str, Any]]:
    try:
        kind, facts = job.result()
    except Exception as error:  # submitit raises several exceptions for a lost job
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        return "failed", {"message": f"job {job.job_id} ended unexpectedly ({last[0]})"}
    return kind, dict(facts)
