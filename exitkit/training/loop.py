"""The training loop: phases, epochs, checkpoints and resuming. It does not depend on the method."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from exitkit.engine.engine import launch
from exitkit.engine.memory import begin_peak, give_back_freed, peak_mib
from exitkit.errors import UserError
from exitkit.files import exists, save_tensors
from exitkit.runs.evaluate import augment_validation, evaluate_held, measure
from exitkit.runs.fingerprints import check_same
from exitkit.runs.folder import WEIGHTS, RunFolder, nearest_unfinished
from exitkit.runs.ingredients import load_initial, teacher_recipes
from exitkit.runs.job import resolve
from exitkit.runs.recipe import Recipe, ResolvedRecipe
from exitkit.strategy.meter import split_totals
from exitkit.training.batches import EpochBatches, learning_rate
from exitkit.training.checkpoint import finite_state
from exitkit.training.history import EpochMeasures, History
from exitkit.training.observers import EpochEnd
from exitkit.training.phase import BegunPhase
from exitkit.training.progress import Progress, ProgressFile, Report
from exitkit.training.setup import Training, set_up


def train(
    recipe: Recipe | Mapping[str, object],
    out: str | Path = "runs",
    *,
    resume: bool | None = None,
    report: Report = lambda progress: None,
) -> RunFolder:
    """Train and evaluate one run, in a folder of its own below `out`.

    Args:
        recipe: what to train; a mapping is made into a `Recipe`.
        out: the folder of the run folders.
        resume: True: resume the run of these settings, or begin it, unless there is only an unfinished run of other
            settings, which is an error; False: an unfinished run of these settings is an error; None: begin or resume.
            A finished run is returned as it is.
        report: called with a `Progress` a few times per second.

    Returns:
        the finished run's folder.

    Raises:
        UserError: anything is wrong with the recipe, the data or the disk; before anything is written, if possible.
        NonFiniteError: a loss or a weight became NaN or infinite.
    """
    resolved = resolve(recipe if isinstance(recipe, Recipe) else Recipe.make(**recipe))
    path = Path(out) / resolved.id
    if not RunFolder.is_finished(path):
        for name, teacher in teacher_recipes(resolved).items():
            train(teacher, out, report=partial(_report_teacher, report, name))
    with launch(resolved.device, resolved.precision, resolved.threads) as engine:
        existing = _find(path, resolved, resume)
        engine.ranks.barrier()  # all ranks must search before the main rank makes the folder
        if existing is not None:
            check_same([(existing, resolved)], tell=engine.ranks.is_main)
            if existing.finished:
                return existing
        give_back_freed()
        with engine.placement.forked_randomness():
            return _train(resolved, set_up(resolved, engine, path, ProgressFile(path, report, engine.ranks.is_main)))


def _train(recipe: ResolvedRecipe, training: Training) -> RunFolder:
    """Train the phases and evaluate; every rank returns when the run is finished."""
    folder, engine, ranks = training.folder, training.engine, training.engine.ranks
    with folder.held() if ranks.is_main else nullcontext():
        ranks.barrier()  # the process that held the lock before has written its last checkpoint
        finished = folder.finished
        ranks.barrier()
        if not finished:
            _train_phases(training)
            if ranks.is_main:
                save_tensors(folder.path / WEIGHTS, training.job.network.state_dict(), folder.name)
                evaluate_held(folder, recipe.with_values(device=str(engine.device)))
                for observer in training.observers:
                    observer.on_training_end()
            ranks.barrier()  # only the main rank evaluates
    return folder


def _report_teacher(report: Report, name: str, progress: Progress) -> None:
    report(replace(progress, phase=f"teacher {name}, {progress.phase}"))


def _find(path: Path, recipe: ResolvedRecipe, resume: bool | None) -> RunFolder | None:
    """Return the existing run of this recipe, or None.

    Raises:
        UserError: `resume` does not allow it, or the folder contains another run.
    """
    if not exists(path):
        nearest = nearest_unfinished(recipe, path.parent) if resume else ""
        if nearest:
            raise UserError(
                f"the unfinished run has other settings: {nearest}; give its settings, or leave --resume out"
            )
        return None
    folder = RunFolder(path)
    if folder.recipe.identity() != recipe.identity():
        raise UserError(f"the settings of run folder {path} do not match its name; choose another --out")
    if resume is False and not folder.finished:
        raise UserError(f"run {path} exists and is unfinished; resume it by --resume, or choose another --out")
    return folder


def _train_phases(training: Training) -> None:
    """Train the remaining epochs of all phases, with a checkpoint after each epoch."""
    job = training.job
    state = training.checkpoints.load()
    if state:
        training.history = History.load(state, training.folder.path)
    first = state["position"][0] if state else job.first
    for number, phase in enumerate(job.phases):
        if not state and number == first and training.begun is None:
            load_initial(training.recipe, job.network)
        begun = training.begun if number == 0 and training.begun else training.phases.begin(number)
        if number < first:
            continue  # it is trained already, and only adapts the network
        if state and number == first:
            training.checkpoints.restore(begun.run, state)
        while begun.run.position.epoch < phase.epochs:
            _train_epoch(training, begun)
        for observer in training.observers:
            observer.on_phase_end(begun.run, phase.strategy, phase.name)


def _train_epoch(training: Training, begun: BegunPhase) -> None:
    """Train one epoch, or its remaining passes, and save."""
    run, history, device = begun.run, training.history, training.engine.device
    begin_peak(device)
    start = time.perf_counter() - history.seconds  # includes the time before an interruption
    history.seconds = 0.0
    batches = _batches(training, begun)
    begun.train_mode()

    def save() -> None:
        saved = replace(history, seconds=time.perf_counter() - start)
        training.checkpoints.save(run, saved)
        training.engine.ranks.barrier()

    run.on_checkpoint = save
    begun.phase.strategy.train_epoch(run, batches)
    seconds = time.perf_counter() - start
    _end_epoch(training, begun, batches, seconds, peak_mib(device))


def _batches(training: Training, begun: BegunPhase) -> EpochBatches:
    job, number = training.job, begun.run.position.phase
    lengths = [phase.epochs for phase in job.phases]
    total, before = sum(lengths[job.first :]), sum(lengths[job.first : number])
    done = (before / total, begun.phase.epochs / total)
    return EpochBatches(begun.run, job.data, job.recipe, training.engine, begun.phase, done, training.progress)


def _end_epoch(training: Training, begun: BegunPhase, batches: EpochBatches, seconds: float, peak: float) -> None:
    """Validate, record the epoch, notify the observers, and save."""
    job, engine, run, phase, history = training.job, training.engine, begun.run, begun.phase, training.history
    ranks, epoch = engine.ranks, run.position.epoch + 1
    trained = EpochMeasures(*split_totals(ranks.total(run.meter.totals(), engine.device)))
    augment = augment_validation(job.recipe, "validation")
    sums = measure(job.network, job.data, "validation", engine, augment)
    validated = EpochMeasures(*split_totals(ranks.total(sums, engine.device)))
    history.add_epoch(phase.name, epoch, learning_rate(job.recipe, run.position, phase.lr), trained, validated)
    history.add_timing(phase.name, epoch, seconds, peak)
    begun.train_mode()
    finite_state(run)  # before files of an epoch that can't be saved are written
    end = EpochEnd(history, batches.end(epoch, seconds, trained.losses, trained.accuracies))
    for observer in training.observers:
        observer.on_epoch_end(run, end)
    run.position.end_epoch()
    training.checkpoints.save(run, history)
    ranks.barrier()
    for observer in training.observers:
        observer.on_epoch_saved(run, end)
