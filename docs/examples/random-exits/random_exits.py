"""Random exits: in each step the last exit is trained, and some of the others.

Paper: none, it is the example of exitkit's documentation. Nothing can differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from exitkit import Run, TrainingStrategy, UserError, setting


@dataclass(eq=False)
class RandomExits(TrainingStrategy):
    """Random exits: every earlier exit is trained in a random share of the steps."""

    slots = frozenset({"exit weights"})
    paper = "the example of exitkit's documentation"

    keep: float = setting(0.5, "share of the steps in which an earlier exit is trained")

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise UserError(f"keep is {self.keep}; expected a share between 0 and 1")

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Draw this step's exits: the same on all ranks, and again after a resume."""
        draws = torch.rand(run.network.num_exits - 1, generator=run.rng("exits"))
        earlier = draws < self.keep
        return [*earlier.double().tolist(), 1.0]
