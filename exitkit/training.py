"""The loop: phases, epochs, checkpoint, resume. It never asks which method it runs."""

from __future__ import annotations

import copy
import csv
import io
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import exitkit
from exitkit.build import build_strategy
from exitkit.data.base import Data
from exitkit.engine import Engine, ranks_left_at_exit
from exitkit.errors import NonFiniteError, UserError
from exitkit.exit_outputs import augment_validation, evaluate, load_data, make_network, measure
from exitkit.feed import EpochBatches, Progress, check_batches
from exitkit.files import append_line, load_checkpoint, save_checkpoint, save_tensors, write_json, write_text
from exitkit.meter import split_totals
from exitkit.network import MultiExitNetwork
from exitkit.randomness import derive
from exitkit.recipe import Recipe
from exitkit.run import Position, Run
from exitkit.runs import RunFolder, unfinished_twin
from exitkit.schedule import learning_rate
from exitkit.strategy import Phase

Report = Callable[[Progress], None]
_CHECKPOINT_KEYS = {"network", "optimizer", "scaler", "strategy", "auxiliaries", "position", "metrics"}


@dataclass
class Session:
    """All that one training holds on to."""

    recipe: Recipe
    engine: Engine
    data: Data
    network: MultiExitNetwork
    phases: list[Phase]
    folder: RunFolder | None = None
    report: Report = lambda progress: None
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def save(self, run: Run) -> None:
        """Write a checkpoint (main rank), unless the weights are no longer finite."""
        if not all(
            tensor.isfinite().all() for tensor in run.network.state_dict().values() if tensor.is_floating_point()
        ):
            raise NonFiniteError(
                f"weights are not finite after epoch {run.position.epoch + 1}; try a lower --lr "
                "(the last good checkpoint is kept)"
            )
        if self.engine.is_main:
            assert self.folder is not None
            save_checkpoint(self.folder.path / "checkpoint.pt", run.state_dict() | {"metrics": self.metrics})
            write_text(self.folder.path / "metrics.csv", _csv(self.metrics))
        self.engine.barrier()


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
    done = _find(path, recipe, resume)
    if done is not None and done.finished:
        return done
    with ranks_left_at_exit():
        engine = Engine.launch(recipe.device, recipe.precision, recipe.threads)
        session = _prepare(recipe, engine, path, report)
        session.folder = _open(session, path)
        if not engine.is_main:
            _train_phases(session)
            return session.folder
        with session.folder.held():
            if not session.folder.finished:
                _train_phases(session)
                save_tensors(path / "weights.safetensors", session.network.state_dict())
                evaluate(session.folder, device=str(engine.device))
        return session.folder


def _find(path: Path, recipe: Recipe, resume: bool | None) -> RunFolder | None:
    """Return the run of this recipe, if there is one, and refuse what `resume` does not allow."""
    if not path.exists():
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


def _prepare(recipe: Recipe, engine: Engine, path: Path, report: Report) -> Session:
    """Make data, network and phases, and try everything that can fail before a folder is made."""
    stored = path / "split.safetensors"
    data = load_data(recipe, stored if stored.exists() else None)
    check_batches(recipe, data, engine.world)
    network = make_network(recipe, data.input_shape, data.num_classes)
    assert recipe.epochs is not None
    phases = build_strategy(recipe.method, **recipe.method_settings).phases(recipe.epochs)
    rehearsal = copy.deepcopy(network)
    for phase in phases:
        phase.strategy.adapt(rehearsal)
    return Session(recipe, engine, data, network, phases, report=report)


def _open(session: Session, path: Path) -> RunFolder:
    """Make the run's folder (main rank), unless it is there."""
    if session.engine.is_main and not path.exists():
        environment = _environment(session)
        RunFolder.create(
            path.parent,
            session.recipe,
            {
                "environment.json": lambda target: write_json(target, environment),
                "split.safetensors": session.data.split.save,
                "timing.csv": lambda target: write_text(target, "phase,epoch,seconds\n"),
            },
        )
    session.engine.barrier()
    return RunFolder(path)


def _train_phases(session: Session) -> None:
    """Train what is not trained yet, phase by phase and epoch by epoch, with a checkpoint after each."""
    assert session.folder is not None
    saved = session.folder.path / "checkpoint.pt"
    state = load_checkpoint(saved, _CHECKPOINT_KEYS) if saved.exists() else None
    session.metrics = list(state["metrics"]) if state else []
    first = state["position"][0] if state else 0
    for number, phase in enumerate(session.phases):
        run = _begin(session, number, phase)
        if number < first:
            continue  # its adaptation is all that is left of it
        if state and number == first:
            _restore(run, state, saved)
        while run.position.epoch < phase.epochs:
            began = time.perf_counter()
            batches = _batches(session, run, number, phase)
            _train_mode(session.network, phase)
            run.on_checkpoint = lambda run=run: session.save(run)  # type: ignore[misc]
            phase.strategy.train_epoch(run, batches)
            _end_epoch(session, run, phase, batches, time.perf_counter() - began)


def _begin(session: Session, number: int, phase: Phase) -> Run:
    """Adapt the network for a phase, and make its optimiser and what its strategy needs."""
    recipe, network = session.recipe, session.network
    torch.manual_seed(derive(recipe.seed, "adapt", number))
    before = {name for name, _ in network.named_parameters()}
    phase.strategy.adapt(network)
    session.engine.place(network)
    for name, parameter in network.named_parameters():
        new, head = name not in before, name.startswith(("heads.", "link."))
        parameter.requires_grad_({"all": True, "new": new, "heads": head}[phase.train])
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError(f"phase {phase.name} of method {recipe.method} has no parameter to train")
    assert recipe.lr is not None and recipe.weight_decay is not None
    optimizer = torch.optim.SGD(trained, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    position = Position(phase=number, epochs=phase.epochs)
    run = Run(network, phase.strategy, optimizer, session.engine, recipe.seed, position)
    torch.manual_seed(derive(recipe.seed, "prepare", number))
    phase.strategy.prepare(run)
    return run


def _restore(run: Run, state: Mapping[str, Any], path: Path) -> None:
    try:
        run.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} does not fit this run ({reason}); delete it to start the run anew") from None


def _train_mode(network: nn.Module, phase: Phase) -> None:
    network.train()
    if phase.batchnorm == "frozen":
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _batches(session: Session, run: Run, number: int, phase: Phase) -> EpochBatches:
    total = sum(each.epochs for each in session.phases)
    before = sum(each.epochs for each in session.phases[:number])
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
    run.position.epoch, run.position.passes, run.position.step = run.position.epoch + 1, 0, 0
    session.save(run)
    if engine.is_main:
        assert session.folder is not None
        append_line(session.folder.path / "timing.csv", f"{phase.name},{row['epoch']},{seconds:.3f}")
    batches.end(row["epoch"], seconds, losses, accuracies)


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n") if rows else None
    if writer:
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _environment(session: Session) -> dict[str, Any]:
    engine = session.engine
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else None
    return {
        "exitkit": exitkit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": str(engine.device),
        "gpu": gpu,
        "ranks": engine.world,
        "parameters": sum(parameter.numel() for parameter in session.network.parameters()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
