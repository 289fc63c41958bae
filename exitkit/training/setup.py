"""Set-up of training: everything that can fail is done before the run's folder is made."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from exitkit.data.base import Data
from exitkit.data.describe import describe
from exitkit.data.inventory import Inventory
from exitkit.engine.engine import Engine
from exitkit.errors import Note, UserError
from exitkit.files import exists, write_json, write_text, written_whole
from exitkit.networks.build import make_backbone
from exitkit.networks.ownership import frozen
from exitkit.runs.fingerprints import job_facts
from exitkit.runs.folder import FEATURES, IMAGES, SPLIT, RunFolder
from exitkit.runs.ingredients import check_unseen, load_initial, load_side_network, load_teachers
from exitkit.runs.job import Job, image_root
from exitkit.runs.recipe import ResolvedRecipe
from exitkit.training.batches import check_batches
from exitkit.training.checkpoint import Checkpoints
from exitkit.training.environment import environment
from exitkit.training.features import phase_data
from exitkit.training.finetuning import check_options
from exitkit.training.history import TIMING_COLUMNS, History, csv_text
from exitkit.training.observers import LearnedTables, MetricsFiles, Observer, Reporting
from exitkit.training.phase import BegunPhase, PhaseSetup, check_trains, trains
from exitkit.training.probe import Probing
from exitkit.training.progress import Progress, ProgressFile
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
        describe_data: passes on the lines that describe the data, when nothing has failed before training.
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
    describe_data: Callable[[], None]
    history: History = field(default_factory=History)

    def phase_data(self, number: int, begun: BegunPhase) -> AbstractContextManager[Data]:
        """Return a context that gives the data of a phase: images, or the features of a frozen trunk.

        A phase that is complete, which was interrupted later, needs no features.
        """
        phase = self.job.phases[number]

        def report(share: float, rate: float) -> None:
            before = sum(earlier.epochs for earlier in self.job.phases[self.job.first : number])
            total = sum(other.epochs for other in self.job.phases[self.job.first :])
            name = f"{phase.name}, features of the trunk: {share:.0%}"
            self.progress(Progress(name, 0, phase.epochs, before / total, rate, [], []))

        if begun.run.position.epoch >= phase.epochs:
            if self.engine.ranks.is_main:  # of a process that was killed after the last epoch
                shutil.rmtree(self.folder.path / FEATURES, ignore_errors=True)
            return nullcontext(self.job.data)
        return phase_data(self.job, number, self.engine, self.folder, report)

    @property
    def recipe(self) -> ResolvedRecipe:
        """The job's recipe."""
        return self.job.recipe


Announce = Callable[[Sequence[str]], None]
"""Takes the lines that describe the data of a run, before its training."""


def set_up(
    recipe: ResolvedRecipe, engine: Engine, path: Path, progress: ProgressFile, announce: Announce = lambda lines: None
) -> Training:
    """Make data, network, phases and the run's folder; the first phase of a new run begins before the folder is made.

    Raises:
        UserError: anything is wrong with the recipe, the images, other runs that it uses, or the disk.
    """
    new = not exists(path / "checkpoint.pt")
    lines: list[str] = []
    with engine.ranks.agreeing() as facts:
        job = _make_job(recipe, path, engine, new, lines.extend)
        if engine.ranks.world > 1:
            facts.update(job_facts(job))
        teachers = load_teachers(recipe, path.parent, job.data)
        log = TensorBoardLog(path) if recipe.tensorboard and engine.ranks.is_main else None
        if new and job.first == 0:
            load_initial(recipe, job.network)
    job = Job(recipe, job.data.on(engine.device), job.network, job.strategy, job.phases)
    for teacher in teachers.values():
        engine.place(teacher)
    phases = PhaseSetup(job, engine, teachers, partial(load_side_network, recipe))
    begun = phases.begin(0) if new and job.first == 0 else None
    if begun and engine.ranks.is_main:
        _note_random_trunk(job)
    folder = _open_folder(job, engine, path)
    checkpoints = Checkpoints(folder, recipe.id, len(job.phases), engine.ranks.is_main)
    observers: list[Observer] = [Probing(recipe.probe_every, job.data, engine)] if recipe.probe_every else []
    if engine.ranks.is_main:
        observers += [MetricsFiles(folder), LearnedTables(folder), *([log] if log else [])]
    observers.append(Reporting(progress))
    describe_data = partial(announce, lines)
    return Training(job, engine, folder, checkpoints, progress, observers, phases, begun, describe_data)


def _make_job(recipe: ResolvedRecipe, path: Path, engine: Engine, new: bool, announce: Announce) -> Job:
    """Make data, network and phases of a new or begun run, and check that they fit each other."""
    stored = path / SPLIT
    job = Job.make(recipe, stored if exists(stored) else None)
    if engine.ranks.is_main:
        announce(describe(job.data))
    check_batches(recipe, job.data, engine.ranks.world)
    check_options(recipe, job.phases[job.first :])
    checked = job.data.check()
    if engine.ranks.is_main and checked:
        announce([checked])
    if new and recipe.init_from:
        source = Path(recipe.init_from) if Path(recipe.init_from).is_dir() else Path(recipe.init_from).parent
        if all((source / name).is_file() for name in ("recipe.json", SPLIT)):  # a run, or its file of weights
            check_unseen(source, recipe, job.data)
    _rehearse(job, new)
    return job


def _rehearse(job: Job, new: bool) -> None:
    """Apply all adaptations, and the initial weights, to a copy of the network.

    Raises:
        UserError: an adaptation is not possible, a phase has nothing to train, no phase trains parameters that a method
            adds, or the weights do not fit.
    """
    copied, idle = copy.deepcopy(job.network), dict[str, str]()
    for number, phase in enumerate(job.phases):
        if new and number == job.first:
            load_initial(job.recipe, copied)
        before = {name for name, _ in copied.named_parameters()}
        phase.strategy.adapt(copied)
        check_trains(phase, job.recipe.method, copied, before, frozen(copied))
        idle |= {name: phase.name for name, _ in copied.named_parameters() if name not in before}
        idle = {name: where for name, where in idle.items() if not trains(phase, name, new=name not in before)}
    if new and idle:
        name, where = next(iter(idle.items()))
        raise UserError(
            f"no phase of method {job.recipe.method} trains {name}, which the network gets in phase {where}; leave out "
            "the method that adds it"
        )


def _note_random_trunk(job: Job) -> None:
    recipe, phase = job.recipe, job.phases[0]
    backbone = make_backbone(recipe.backbone, recipe.backbone_settings)
    pretrained = backbone.preprocessing() or backbone.weights_files() or recipe.init_from
    if phase.trunk and not pretrained:
        text = (
            f"{recipe.method} does not train the trunk of {recipe.backbone}, whose weights are random without init_from"
        )
        warnings.warn(Note(text), stacklevel=3)


def _open_folder(job: Job, engine: Engine, path: Path) -> RunFolder:
    """Return the run's folder; the main rank makes it if it does not exist."""
    with engine.ranks.agreeing():
        if engine.ranks.is_main and not exists(path):
            about = environment(job, engine)
            RunFolder.create(
                path.parent,
                job.recipe,
                {
                    "environment.json": lambda target: write_json(target, about),
                    SPLIT: partial(job.data.split.save, run=job.recipe.id),
                    "timing.csv": lambda target: write_text(target, csv_text([], TIMING_COLUMNS)),
                },
            )
        root = image_root(job.recipe)
        if engine.ranks.is_main and root is not None:
            _write_inventory(job.data.inventory(root), path / IMAGES)
    with engine.ranks.agreeing():
        if not exists(path):
            raise UserError(f"{path}, which rank 0 made, does not exist here; expected an --out that all ranks share")
        return RunFolder(path)


def _write_inventory(inventory: Inventory | None, path: Path) -> None:
    """Write the table of the image files; a resumed run writes it again, since a damaged image may have been mended."""
    content = inventory.dump() if inventory else b""
    if content and not (exists(path) and path.read_bytes() == content):
        with written_whole(path) as temporary:
            temporary.write_bytes(content)
