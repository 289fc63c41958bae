"""Set-up of training: everything that can fail is done before the run's folder is made."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from exitkit.engine.engine import Engine
from exitkit.files import exists, write_json, write_text
from exitkit.runs.folder import SPLIT, RunFolder
from exitkit.runs.ingredients import check_unseen, load_initial, load_side_network, load_teachers
from exitkit.runs.job import Job
from exitkit.runs.recipe import ResolvedRecipe
from exitkit.training.batches import check_batches
from exitkit.training.checkpoint import Checkpoints
from exitkit.training.environment import environment
from exitkit.training.history import TIMING_COLUMNS, History, csv_text
from exitkit.training.observers import LearnedTables, MetricsFiles, Observer, Reporting
from exitkit.training.phase import BegunPhase, PhaseSetup, check_trains
from exitkit.training.probe import Probing
from exitkit.training.progress import ProgressFile
from exitkit.training.tensorboard import TensorBoardLog


@dataclass
class Training:
    """The training state of one run.

    Attributes:
        job: the job.
        engine: this process's engine.
        folder: the run's folder.
        checkpoints: the run's checkpoint.
        progress: writes and reports the progress.
        observers: the observers of the loop.
        phases: the set-up of the phases.
        begun: phase 0, if it began before the folder was made.
        history: the records so far.
    """

    job: Job
    engine: Engine
    folder: RunFolder
    checkpoints: Checkpoints
    progress: ProgressFile
    observers: list[Observer]
    phases: PhaseSetup
    begun: BegunPhase | None
    history: History = field(default_factory=History)

    @property
    def recipe(self) -> ResolvedRecipe:
        """The job's recipe."""
        return self.job.recipe


def set_up(recipe: ResolvedRecipe, engine: Engine, path: Path, progress: ProgressFile) -> Training:
    """Make data, network, phases and the run's folder; the first phase of a new run begins before the folder is made.

    Raises:
        UserError: anything is wrong with the recipe, the images, other runs that it uses, or the disk.
    """
    stored = path / SPLIT
    job = Job.make(recipe, stored if exists(stored) else None)
    job = Job(recipe, job.data.on(engine.device), job.network, job.strategy, job.phases)
    check_batches(recipe, job.data, engine.ranks.world)
    new = not exists(path / "checkpoint.pt")
    if new and recipe.init_from and Path(recipe.init_from).is_dir():
        check_unseen(Path(recipe.init_from), recipe, job.data)
    _rehearse(job, new)
    teachers = load_teachers(recipe, path.parent, job.data)
    for teacher in teachers.values():
        engine.place(teacher)
    phases = PhaseSetup(job, engine, teachers, partial(load_side_network, recipe))
    log = TensorBoardLog(path) if recipe.tensorboard and engine.ranks.is_main else None
    begun = None
    if new and job.first == 0:
        load_initial(recipe, job.network)
        begun = phases.begin(0)
    folder = _open_folder(job, engine, path)
    checkpoints = Checkpoints(folder, recipe.id, len(job.phases), engine.ranks.is_main)
    observers: list[Observer] = [Probing(recipe.probe_every, job.data, engine)] if recipe.probe_every else []
    if engine.ranks.is_main:
        observers += [MetricsFiles(folder), LearnedTables(folder), *([log] if log else [])]
    observers.append(Reporting(progress))
    return Training(job, engine, folder, checkpoints, progress, observers, phases, begun)


def _rehearse(job: Job, new: bool) -> None:
    """Apply all adaptations, and the initial weights, to a copy of the network.

    Raises:
        UserError: an adaptation is not possible, a phase has nothing to train, or the weights do not fit.
    """
    copied = copy.deepcopy(job.network)
    for number, phase in enumerate(job.phases):
        if new and number == job.first:
            load_initial(job.recipe, copied)
        before = {name for name, _ in copied.named_parameters()}
        phase.strategy.adapt(copied)
        check_trains(phase, job.recipe.method, copied, before)


def _open_folder(job: Job, engine: Engine, path: Path) -> RunFolder:
    """Return the run's folder; the main rank makes it if it does not exist."""
    if engine.ranks.is_main and not exists(path):
        facts = environment(job, engine)
        RunFolder.create(
            path.parent,
            job.recipe,
            {
                "environment.json": lambda target: write_json(target, facts),
                SPLIT: partial(job.data.split.save, run=job.recipe.id),
                "timing.csv": lambda target: write_text(target, csv_text([], TIMING_COLUMNS)),
            },
        )
    engine.ranks.barrier()
    return RunFolder(path)
