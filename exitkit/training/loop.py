"""The training loop: phases, epochs, checkpoints and resuming. It does not depend on the method."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from exitkit.data.base import Data
from exitkit.engine.engine import launch
from exitkit.engine.memory import begin_peak, give_back_freed, peak_mib
from exitkit.errors import UserError
from exitkit.files import exists, given_path, save_tensors
from exitkit.inference.calibration import fit_temperatures
from exitkit.runs.evaluate import augment_validation, collect_outputs, evaluate_held, measure
from exitkit.runs.fingerprints import check_same, start_facts
from exitkit.runs.folder import WEIGHTS, RunFolder, nearest_unfinished
from exitkit.runs.ingredients import load_initial, teacher_recipes
from exitkit.runs.job import check_effects, resolve
from exitkit.runs.recipe import Recipe, ResolvedRecipe
from exitkit.strategy.meter import split_totals
from exitkit.training.batches import EpochBatches, learning_rate
from exitkit.training.checkpoint import check_finite
from exitkit.training.history import EpochMeasures, History
from exitkit.training.observers import EpochEnd
from exitkit.training.phase import BegunPhase
from exitkit.training.progress import Progress, ProgressFile, Report
from exitkit.training.setup import Announce, Training, set_up


def train(
    recipe: Recipe | Mapping[str, object],
    out: str | Path = "runs",
    *,
    resume: bool | None = None,
    report: Report = lambda progress: None,
    announce: Announce = lambda lines: None,
) -> RunFolder:
    """Train and evaluate one run, in a folder of its own below `out`.

    Args:
        recipe: what to train: a `Recipe`, or a mapping of its keys, such as
            `{"method": "boostnet", "method_settings": {"temperature": 0.8}}`.
        out: the folder of the run folders.
        resume: True: resume the run of these settings, or begin it, unless there is only an unfinished run of other
            settings, which is an error; False: an unfinished run of these settings is an error; None: begin or resume.
            A finished run is returned as it is.
        report: called with a `Progress` a few times per second.
        announce: called with lines of text that describe the images, before training.

    Returns:
        the finished run's folder.

    Raises:
        UserError: anything is wrong with the recipe, the data or the disk; before anything is written, if possible.
        NonFiniteError: a loss or a weight became NaN or infinite.
    """
    if not isinstance(recipe, Recipe | Mapping):
        raise UserError(
            f"recipe is a {type(recipe).__name__}; expected a dictionary or a Recipe (of a file: Recipe.read(FILE))"
        )
    given = recipe if isinstance(recipe, Recipe) else Recipe.make(**recipe)
    resolved = resolve(given)
    path = given_path("out", out) / resolved.id
    process = launch(
        resolved.device, resolved.precision, resolved.threads, resolved.layout, deterministic=resolved.deterministic
    )
    with process as engine:
        ranks = engine.ranks
        with ranks.agreeing() as facts:  # all ranks must search before the main rank makes the folder
            if ranks.world > 1:
                facts.update(start_facts(resolved))
            existing = _find(path, resolved, resume)
            facts["run folder"] = _state(existing)
            if existing is None:
                check_effects(given)
            else:
                check_same([(existing, resolved)], tell=ranks.is_main)
        if existing is not None and existing.finished:
            return existing
        for name, teacher in teacher_recipes(resolved).items():
            train(teacher, out, report=partial(_report_teacher, report, name))
        give_back_freed()
        with engine.placement.forked_randomness():
            progress = ProgressFile(path, report, engine.ranks.is_main)
            return _train(resolved, set_up(resolved, engine, path, progress, announce))


def _train(recipe: ResolvedRecipe, training: Training) -> RunFolder:
    """Train the phases and evaluate; every rank returns when the run is finished."""
    folder, engine, ranks = training.folder, training.engine, training.engine.ranks
    with ExitStack() as lock:
        with ranks.agreeing():
            if ranks.is_main:
                lock.enter_context(folder.held())
        with ranks.agreeing() as facts:  # the process that held the lock before has written its last checkpoint
            finished = folder.finished
            facts["run folder"] = _state(folder)
            if ranks.world > 1:
                facts["digest of the checkpoint"] = training.checkpoints.digest()
        if not finished:
            _train_phases(training)
            with ranks.agreeing():  # only the main rank evaluates
                if ranks.is_main:
                    save_tensors(folder.path / WEIGHTS, training.job.network.state_dict(), folder.name)
                    evaluate_held(folder, recipe.with_values(device=str(engine.device)))
                    for observer in training.observers:
                        observer.on_training_end()
    return folder


def _state(folder: RunFolder | None) -> str:
    if folder is None:
        return "absent"
    return "finished" if folder.finished else "unfinished"


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
    training.describe_data()
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
            training.checkpoints.restore(begun, state)
        with training.phase_data(number, begun) as data:
            while begun.run.position.epoch < phase.epochs:
                _train_epoch(training, begun, data)
        with training.engine.ranks.agreeing():
            for observer in training.observers:
                observer.on_phase_end(begun.run, phase.strategy, phase.name)


def _train_epoch(training: Training, begun: BegunPhase, data: Data) -> None:
    """Train one epoch, or its remaining passes, on the data of its phase, and save."""
    run, history, device = begun.run, training.history, training.engine.device
    begin_peak(device)
    start = time.perf_counter() - history.seconds  # includes the time before an interruption
    history.seconds = 0.0
    batches = _batches(training, begun, data)
    begun.train_mode()

    def save() -> None:
        with training.engine.ranks.agreeing():
            training.checkpoints.save(begun, replace(history, seconds=time.perf_counter() - start))

    run.on_checkpoint = save
    begun.phase.strategy.train_epoch(run, batches)
    seconds = time.perf_counter() - start
    _end_epoch(training, begun, data, batches, seconds, peak_mib(device))


def _calibrate(training: Training, data: Data) -> None:
    """Fit the network's temperatures on the validation images."""
    network, augment = training.job.network, augment_validation(training.recipe, "validation")
    network.set_temperatures([1.0] * network.num_exits)
    outputs = collect_outputs(network, data, "validation", training.engine, augment)
    network.set_temperatures(fit_temperatures(outputs["logits"].float(), outputs["labels"]))


def _batches(training: Training, begun: BegunPhase, data: Data) -> EpochBatches:
    job, number = training.job, begun.run.position.phase
    lengths = [phase.epochs for phase in job.phases]
    total, before = sum(lengths[job.first :]), sum(lengths[job.first : number])
    done = (before / total, begun.phase.epochs / total)
    return EpochBatches(begun.run, data, job.recipe, training.engine, begun.phase, done, training.progress)


def _end_epoch(
    training: Training, begun: BegunPhase, data: Data, batches: EpochBatches, seconds: float, peak: float
) -> None:
    """Validate, record the epoch, notify the observers, and save."""
    job, engine, run, phase, history = training.job, training.engine, begun.run, begun.phase, training.history
    ranks, epoch = engine.ranks, run.position.epoch + 1
    trained = EpochMeasures(*split_totals(ranks.total(run.meter.totals(), engine.device)))
    augment = augment_validation(job.recipe, "validation")
    sums = measure(begun.evaluated, data, "validation", engine, augment)
    validated = EpochMeasures(*split_totals(ranks.total(sums, engine.device)))
    history.add_epoch(phase.name, epoch, learning_rate(job.recipe, run.position, phase.lr), trained, validated)
    history.add_timing(phase.name, epoch, seconds, peak)
    begun.train_mode()
    if begun.average and epoch == phase.epochs:
        begun.average.end()
    check_finite(begun)  # before files of an epoch that can't be saved are written
    end = EpochEnd(history, batches.end(epoch, seconds, trained.losses, trained.accuracies))
    with ranks.agreeing():  # only the main rank writes files
        for observer in training.observers:
            observer.on_epoch_end(run, end)
        if phase.calibrate and epoch == phase.epochs:
            _calibrate(training, data)
        run.position.end_epoch()
        training.checkpoints.save(begun, history, checked=True)
        for observer in training.observers:
            observer.on_epoch_saved(run, end)
