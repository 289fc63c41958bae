"""Checkpoints: a run's state after an epoch, or between two passes of one, and resuming from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from exitkit.errors import NonFiniteError, UserError
from exitkit.files import exists, load_checkpoint, load_tensors, save_checkpoint, save_tensors
from exitkit.runs.folder import RunFolder
from exitkit.runs.formats import CHECKPOINT_KEYS
from exitkit.training.finetuning import TRUNK
from exitkit.training.history import History
from exitkit.training.phase import BegunPhase


class Checkpoints:
    """The checkpoint of one run.

    The trunk of a phase in which it is frozen is written once, into a file of its own.

    Args:
        folder: the run's folder.
        name: the run's name; a checkpoint of another run is refused.
        phases: how many phases the run has.
        writes: whether this process writes it (one rank does).
    """

    def __init__(self, folder: RunFolder, name: str, phases: int, writes: bool) -> None:
        self._folder, self._name, self._phases, self._writes = folder, name, phases, writes
        self._trunks: dict[int, Path] = {}

    @property
    def path(self) -> Path:
        """Path of the checkpoint."""
        return self._folder.path / "checkpoint.pt"

    def load(self) -> dict[str, Any] | None:
        """Return the saved state, or None if there is no checkpoint.

        Raises:
            UserError: the checkpoint is damaged, or of another run.
        """
        if not exists(self.path):
            return None
        state = load_checkpoint(self.path, CHECKPOINT_KEYS)
        position, phases = state["position"], range(self._phases)
        valid = isinstance(position, list | tuple) and len(position) > 1 and position[0] in phases
        valid = valid and all(
            isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
            for rows in (state["metrics"], state["probes"])
        )
        if not valid:
            raise UserError(f"{self.path} is damaged; delete it to start the run again")
        if state.get("run", self._name) != self._name:
            raise UserError(f"{self.path} is of another run, {state['run']}; delete it to start this run again")
        if "trunk" in state:
            path = self._trunk(state["trunk"])
            trunk = load_tensors(path)
            if tensors_digest(trunk) != state["trunk"]:
                raise UserError(f"{path} is damaged; delete {self.path.name} to start the run again")
            state["network"] = {**state["network"], **trunk}
        return state

    def digest(self) -> str:
        """Return a digest of the checkpoint's file, or "absent".

        Raises:
            UserError: the file can't be read.
        """
        try:
            return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        except FileNotFoundError:
            return "absent"
        except OSError as error:
            raise UserError(f"{self.path} can't be read: {error.strerror}") from None

    def restore(self, begun: BegunPhase, state: Mapping[str, Any]) -> None:
        """Restore the saved state of a run whose phase has begun.

        Raises:
            UserError: the state does not fit.
        """
        try:
            begun.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{self.path} does not fit this run ({reason}); delete it to start the run again") from None

    def save(self, begun: BegunPhase, history: History, *, checked: bool = False) -> None:
        """Write the state of a phase and the records of its run.

        Args:
            begun: the phase.
            history: the records.
            checked: whether `check_finite` has checked the state already.

        Raises:
            NonFiniteError: something in it is NaN or infinite; the last checkpoint stays.
        """
        if not checked:
            check_finite(begun)
        if not self._writes:
            return
        state = begun.state_dict() | history.state_dict() | {"run": self._name}
        trunk = self._store_trunk(begun, state) if begun.phase.trunk is not None else None
        save_checkpoint(self.path, state)
        for path in self._folder.path.glob(self._trunk("*").name):
            if path != trunk:
                path.unlink()

    def _store_trunk(self, begun: BegunPhase, state: dict[str, Any]) -> Path:
        """Write the frozen trunk of a phase, unless it is written already, and take it out of the state."""
        network, number = begun.run.network, begun.run.position.phase
        trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        fixed = {name: t for name, t in state["network"].items() if name.startswith(TRUNK) and name not in trained}
        if number not in self._trunks:
            self._trunks[number] = self._trunk(tensors_digest(fixed))
            if not exists(self._trunks[number]):
                save_tensors(self._trunks[number], fixed, self._name)
        state["network"] = {name: tensor for name, tensor in state["network"].items() if name not in fixed}
        state["trunk"] = self._trunks[number].stem.removeprefix("trunk-")
        return self._trunks[number]

    def _trunk(self, digest: str) -> Path:
        return self._folder.path / f"trunk-{digest}.safetensors"


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of the names and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_finite(begun: BegunPhase) -> None:
    """Check the state of a phase, except for parameters that it does not train.

    Raises:
        NonFiniteError: something in it is NaN or infinite.
    """
    run, state = begun.run, begun.state_dict()
    fixed = {name for name, parameter in run.network.named_parameters() if not parameter.requires_grad}
    state["network"] = {name: tensor for name, tensor in state["network"].items() if name not in fixed}
    tensors = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise NonFiniteError(
            f"weights are not finite after epoch {run.position.epoch + 1}; try a lower --lr "
            "(the last good checkpoint is kept)"
        )
