"""Checkpoints: a run's state after an epoch, or between two passes of one, and resuming from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from exitkit.errors import NonFiniteError, UserError
from exitkit.files import exists, load_checkpoint, save_checkpoint
from exitkit.runs.folder import RunFolder
from exitkit.runs.formats import CHECKPOINT_KEYS
from exitkit.strategy.run import Run
from exitkit.training.history import History


class Checkpoints:
    """The checkpoint of one run.

    Args:
        folder: the run's folder.
        name: the run's name; a checkpoint of another run is refused.
        phases: how many phases the run has.
        writes: whether this process writes it (one rank does).
    """

    def __init__(self, folder: RunFolder, name: str, phases: int, writes: bool) -> None:
        self._folder, self._name, self._phases, self._writes = folder, name, phases, writes

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
        return state

    def restore(self, run: Run, state: Mapping[str, Any]) -> None:
        """Restore the saved state of a run whose phase has begun.

        Raises:
            UserError: the state does not fit.
        """
        try:
            run.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{self.path} does not fit this run ({reason}); delete it to start the run again") from None

    def save(self, run: Run, history: History) -> None:
        """Write the state of a run and its records.

        Raises:
            NonFiniteError: something in it is NaN or infinite; the last checkpoint stays.
        """
        state = finite_state(run)
        if self._writes:
            save_checkpoint(self.path, state | history.state_dict() | {"run": self._name})


def finite_state(run: Run) -> dict[str, Any]:
    """Return the state of a run.

    Raises:
        NonFiniteError: something in it is NaN or infinite.
    """
    state = run.state_dict()
    tensors = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise NonFiniteError(
            f"weights are not finite after epoch {run.position.epoch + 1}; try a lower --lr "
            "(the last good checkpoint is kept)"
        )
    return state
