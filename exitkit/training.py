"""The loop: phases, epochs, checkpoint, resume. It never asks which method it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from exitkit.engine import Engine
from exitkit.errors import UserError
from exitkit.exit_outputs import augment_validation, evaluate_held, measure
from exitkit.feed import EpochBatches, Progress
from exitkit.files import append_line, exists, load_checkpoint, save_tensors
from exitkit.heartbeat import Heartbeat
from exitkit.ingredients import load_initial, teacher_recipes
from exitkit.memory import begin_peak, give_back_freed, peak_mib
from exitkit.meter import split_totals
from exitkit.recipe import Recipe
from exitkit.run import Run
from exitkit.runs import WEIGHTS, RunFolder
from exitkit.sameness import check_same, unfinished_twin
from exitkit.schedule import learning_rate
from exitkit.session import Report, Session, begin_phase, keep_learned, look, open_folder, prepare, train_mode
from exitkit.strategy import Phase

CHECKPOINT_KEYS = {"network", "optimizer", "scaler", "strategy", "auxiliaries", "position", "metrics", "probes"}


def train(
    recipe: Recipe | Mapping[str, Any],
    out: str | Path = "runs",
    *,
    resume: bool | None = None,
    report: Report = lambda progress: None,
) -> RunFolder:
    """Train and evaluate one run, in a folder of its own below `out`.

    Args:
        recipe: what to train; a mapping is made into a `Recipe`.
        out: where run folders go.
        resume: True: go on with the run of these settings, or begin it, but refuse where only an unfinished run of
            other settings is there; False: refuse where this run is unfinished; None: begin or go on. A finished run
            is returned as it is.
        report: called with a `Progress` a few times a second.

    Returns:
        the finished run's folder.

    Raises:
        UserError: whatever is wrong with the recipe, the data or the disk; before anything is written, if it can be.
        NonFiniteError: a loss or a weight became NaN or infinite.
    """
    recipe = (recipe if isinstance(recipe, Recipe) else Recipe.make(**recipe)).resolve()
    path = Path(out) / recipe.id
    if not RunFolder.is_finished(path):
        for name, teacher in teacher_recipes(recipe).items():
            train(teacher, out, report=partial(_report_teacher, report, name))
    with Engine.launch(recipe.device, recipe.precision, recipe.threads) as engine:
        done = _find(path, recipe, resume)
        engine.barrier()  # all ranks have looked before the first makes the folder
        if done is not None:
            check_same([(done, recipe)], tell=engine.is_main)
        if done is not None and done.finished:
            return done
        give_back_freed()
        heartbeat = Heartbeat(path, report, engine.is_main)
        session = prepare(recipe, engine, path, heartbeat)
        session.folder = open_folder(session, path)
        with session.folder.held() if engine.is_main else nullcontext():
            engine.barrier()  # whoever held the run before has written its last checkpoint
            finished = session.folder.finished
            engine.barrier()
            if not finished:
                _train_phases(session)
                if engine.is_main:
                    save_tensors(path / WEIGHTS, session.network.state_dict(), session.folder.name)
                    evaluate_held(session.folder, recipe.with_values(device=str(engine.device)))
                    heartbeat.stop()
                    if session.log:
                        session.log.close()
        return session.folder


def _report_teacher(report: Report, name: str, progress: Progress) -> None:
    report(replace(progress, phase=f"teacher {name}, {progress.phase}"))


def _find(path: Path, recipe: Recipe, resume: bool | None) -> RunFolder | None:
    """Return the run of this recipe, if there is one, and refuse what `resume` does not allow."""
    if not exists(path):
        twin = unfinished_twin(recipe, path.parent) if resume else ""
        if twin:
            raise UserError(
                f"the unfinished run is of other settings: {twin}; give its settings, or leave --resume out"
            )
        return None
    folder = RunFolder(path)
    if folder.recipe.identity() != recipe.identity():
        raise UserError(f"run folder {path} was made by other settings than its name says; choose another --out")
    if resume is False and not folder.finished:
        raise UserError(f"run {path} is there, unfinished; go on with it by --resume, or choose another --out")
    return folder


def _train_phases(session: Session) -> None:
    """Train what is not trained yet, phase by phase and epoch by epoch, with a checkpoint after each."""
    assert session.folder is not None
    saved = session.folder.path / "checkpoint.pt"
    state = load_checkpoint(saved, CHECKPOINT_KEYS) if exists(saved) else None
    if state:
        _check_belongs(state, session, saved)
    session.metrics = list(state["metrics"]) if state else []
    session.probes = list(state["probes"]) if state else []
    first = state["position"][0] if state else session.first
    for number, phase in enumerate(session.phases):
        if session.recipe.init_from and not state and number == first:
            load_initial(session.recipe, session.network)
        run = begin_phase(session, number, phase)
        if number < first:
            continue  # its adaptation is all that is left of it
        if state and number == first:
            _restore(run, state, saved)
        while run.position.epoch < phase.epochs:
            begin_peak(session.engine.device)
            began = time.perf_counter()
            batches = _batches(session, run, number, phase)
            train_mode(session.network, session.added, phase)
            run.on_checkpoint = lambda run=run: session.save(run)  # type: ignore[misc]
            phase.strategy.train_epoch(run, batches)
            _end_epoch(session, run, phase, batches, time.perf_counter() - began)
        keep_learned(session, run, phase)


def _check_belongs(state: Mapping[str, Any], session: Session, path: Path) -> None:
    """Refuse a checkpoint of another run: its weights may fit, and what came of it would be of neither run."""
    position, metrics = state["position"], state["metrics"]
    phases = range(len(session.phases))
    whole = isinstance(position, list | tuple) and len(position) > 1 and position[0] in phases
    whole = whole and all(
        isinstance(rows, list) and all(isinstance(r, dict) for r in rows) for rows in (metrics, state["probes"])
    )
    if not whole:
        raise UserError(f"{path} is damaged; delete it to start the run anew")
    if state.get("run", session.recipe.id) != session.recipe.id:
        raise UserError(f"{path} is of another run, {state['run']}; delete it to start this one anew")


def _restore(run: Run, state: Mapping[str, Any], path: Path) -> None:
    try:
        run.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} does not fit this run ({reason}); delete it to start the run anew") from None


def _batches(session: Session, run: Run, number: int, phase: Phase) -> EpochBatches:
    total = sum(each.epochs for each in session.phases[session.first :])
    before = sum(each.epochs for each in session.phases[session.first : number])
    return EpochBatches(
        run,
        session.data,
        session.recipe,
        session.engine,
        phase.name,
        (before / total, phase.epochs / total),
        session.report,
    )


def _end_epoch(session: Session, run: Run, phase: Phase, batches: EpochBatches, seconds: float) -> None:
    """Write down how the epoch went, move on and save."""
    engine, recipe = session.engine, session.recipe
    losses, accuracies = split_totals(engine.total(run.meter.totals()))
    augment = augment_validation(recipe, "validation")
    checked = split_totals(engine.total(measure(session.network, session.data, "validation", engine, augment)))
    row: dict[str, Any] = {
        "phase": phase.name,
        "epoch": run.position.epoch + 1,
        "lr": learning_rate(recipe, run.position),
    }
    named = {"train_loss": losses, "train_accuracy": accuracies}
    named |= {"validation_loss": checked[0], "validation_accuracy": checked[1]}
    for name, values in named.items():
        scale = 100 if name.endswith("accuracy") else 1
        row |= {f"{name}_{number}": scale * value for number, value in enumerate(values, 1)}
    session.metrics.append(row)
    train_mode(session.network, session.added, phase)
    look(session, run)
    run.position.epoch, run.position.passes, run.position.step = run.position.epoch + 1, 0, 0
    session.save(run)
    if engine.is_main:
        assert session.folder is not None
        if session.log:
            session.log.write(session.metrics)
        taken = f"{phase.name},{row['epoch']},{seconds:.3f},{peak_mib(engine.device):.1f}"
        append_line(session.folder.path / "timing.csv", taken)
    batches.end(row["epoch"], seconds, losses, accuracies)
