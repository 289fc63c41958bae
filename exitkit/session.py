"""What one training holds on to, and how it is set up: data, network, phases, folder, a phase's run."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import exitkit
from exitkit.build import build_strategy
from exitkit.compilation import compile_parts
from exitkit.data.base import Data
from exitkit.engine import Engine
from exitkit.errors import NonFiniteError, UserError
from exitkit.exit_outputs import load_data, make_network
from exitkit.feed import Progress, check_batches
from exitkit.files import exists, save_checkpoint, save_tensors, write_json, write_text
from exitkit.ingredients import check_unseen, load_initial, load_teachers
from exitkit.network import MultiExitNetwork
from exitkit.probe import probe, probe_batch, stacked
from exitkit.randomness import derive
from exitkit.recipe import Recipe
from exitkit.run import Position, Run
from exitkit.runs import LEARNED, PROBES, SPLIT, RunFolder
from exitkit.sameness import code_digest, images_digest
from exitkit.strategy import Phase
from exitkit.tensorboard_log import TensorBoardLog

Report = Callable[[Progress], None]
"""Whoever wants to know how training goes."""


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
    first: int = 0
    """See `first_phase`."""
    teachers: dict[str, MultiExitNetwork] = field(default_factory=dict)
    probes: list[dict[str, Tensor]] = field(default_factory=list)
    """What was seen on the probe batch, one entry a look, with the epoch (over all phases) that it came after."""
    log: TensorBoardLog | None = None
    """Where the metrics also go, if asked for (main rank)."""
    added: set[str] = field(default_factory=set)
    """Names of the modules that this phase's `adapt` has put into the network."""

    def save(self, run: Run) -> None:
        """Write a checkpoint (main rank), unless something in it is no longer finite."""
        state = run.state_dict()
        tensors = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise NonFiniteError(
                f"weights are not finite after epoch {run.position.epoch + 1}; try a lower --lr "
                "(the last good checkpoint is kept)"
            )
        if self.engine.is_main:
            assert self.folder is not None
            # The metrics first: killed between the two, the epoch is trained again and they are written again.
            write_text(self.folder.path / "metrics.csv", _csv(self.metrics))
            if self.probes:
                save_tensors(self.folder.path / PROBES, stacked(self.probes), self.folder.name)
            save_checkpoint(
                self.folder.path / "checkpoint.pt",
                state | {"run": self.recipe.id, "metrics": self.metrics, "probes": self.probes},
            )
        self.engine.barrier()


def look(session: Session, run: Run) -> None:
    """Probe the network if this epoch's end is one at which the recipe asks for it."""
    every, epochs = session.recipe.probe_every, len(session.metrics)
    if every and epochs % every == 0:
        seen = probe(run, probe_batch(session.data, session.engine))
        session.probes.append(seen | {"epoch": torch.tensor(epochs)})


def keep_learned(session: Session, run: Run, phase: Phase) -> None:
    """Write down what a phase's strategy has learned besides the network, for `exitkit show`."""
    tables = run.strategy.learned(run)
    if tables and session.engine.is_main:
        assert session.folder is not None
        path = session.folder.path / LEARNED
        earlier = [table for table in session.folder.learned() if table["phase"] != phase.name]
        write_json(path, earlier + [{"phase": phase.name, **table._asdict()} for table in tables])


def prepare(recipe: Recipe, engine: Engine, path: Path, report: Report) -> Session:
    """Make data, network and phases, and try everything that can fail before a folder is made."""
    stored = path / SPLIT
    data = load_data(recipe, stored if exists(stored) else None).on(engine.device)
    check_batches(recipe, data, engine.world)
    network = make_network(recipe, data.input_shape, data.num_classes)
    assert recipe.epochs is not None
    phases = build_strategy(recipe.method, **recipe.method_settings).phases(recipe.epochs, network.num_exits)
    first = first_phase(recipe, phases)
    begun = exists(path / "checkpoint.pt")  # then nothing is started from any more
    if recipe.init_from and not begun and Path(recipe.init_from).is_dir():
        check_unseen(Path(recipe.init_from), recipe, data)
    rehearsal = copy.deepcopy(network)
    for number, phase in enumerate(phases):
        if recipe.init_from and not begun and number == first:
            load_initial(recipe, rehearsal)
        phase.strategy.adapt(rehearsal)
        if not begun:
            unused = torch.optim.SGD(rehearsal.parameters(), lr=0.0)
            phase.strategy.prepare(
                Run(rehearsal, phase.strategy, unused, Engine(torch.device("cpu"), recipe.precision))
            )
    teachers = load_teachers(recipe, path.parent, data)
    for teacher in teachers.values():
        engine.place(teacher)
        if teacher.num_classes != network.num_classes:
            raise UserError(f"a teacher of {teacher.num_classes} classes can't teach {network.num_classes}")
    log = TensorBoardLog(path) if recipe.tensorboard and engine.is_main else None
    return Session(recipe, engine, data, network, phases, report=report, first=first, teachers=teachers, log=log)


def first_phase(recipe: Recipe, phases: list[Phase]) -> int:
    """Return the number of the phase that training begins with: the second where the first is another run's."""
    return 1 if recipe.init_from and len(phases) > 1 else 0


def open_folder(session: Session, path: Path) -> RunFolder:
    """Make the run's folder (main rank), unless it is there."""
    if session.engine.is_main and not exists(path):
        environment = _environment(session)
        RunFolder.create(
            path.parent,
            session.recipe,
            {
                "environment.json": lambda target: write_json(target, environment),
                SPLIT: partial(session.data.split.save, run=session.recipe.id),
                "timing.csv": lambda target: write_text(target, "phase,epoch,seconds,peak_mib\n"),
            },
        )
    session.engine.barrier()
    return RunFolder(path)


def begin_phase(session: Session, number: int, phase: Phase) -> Run:
    """Adapt the network for a phase, and make its optimiser and what its strategy needs."""
    recipe, network = session.recipe, session.network
    torch.manual_seed(derive(recipe.seed, "adapt", number))
    before = {name for name, _ in network.named_parameters()}
    modules = {name for name, _ in network.named_modules()}
    phase.strategy.adapt(network)
    session.added = {name for name, _ in network.named_modules()} - modules
    session.engine.place(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(_trains(phase, name, new=name not in before))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError(f"phase {phase.name} of method {recipe.method} has no parameter to train")
    assert recipe.lr is not None and recipe.weight_decay is not None
    optimizer = torch.optim.SGD(trained, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    position = Position(phase=number, epochs=phase.epochs)
    if recipe.compile:
        compile_parts(network)
    run = Run(network, phase.strategy, optimizer, session.engine, recipe.seed, position)
    run.teachers = session.teachers
    torch.manual_seed(derive(recipe.seed, "prepare", number))
    phase.strategy.prepare(run)
    return run


def train_mode(network: nn.Module, added: set[str], phase: Phase) -> None:
    """Put the network into training mode; frozen batch norm is what was there before and is not trained by prefix."""
    network.train()
    trained = phase.train if isinstance(phase.train, tuple) else ()
    if phase.batchnorm == "frozen":
        for name, module in network.named_modules():
            if isinstance(module, _BatchNorm) and name not in added and not f"{name}.".startswith(trained):
                module.eval()


def _trains(phase: Phase, name: str, *, new: bool) -> bool:
    if isinstance(phase.train, tuple):
        return name.startswith(phase.train)
    return {"all": True, "new": new, "heads": name.startswith(("heads.", "link."))}[phase.train]


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n") if rows else None
    if writer:
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _processor() -> str:
    """Return the processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
        "processor": _processor(),
        "ranks": engine.world,
        "code": code_digest(session.recipe.method),
        "images": images_digest(session.recipe),
        "parameters": sum(parameter.numel() for parameter in session.network.parameters()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
