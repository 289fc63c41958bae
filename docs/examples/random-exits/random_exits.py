"""Random exits: a random choice of the earlier exits is trained in each step, the last exit always.

Paper: none, the example of exitkit's documentation. Nothing differs from published code.
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

    keep: float = setting(0.5, "share of the steps in which an exit before the last is trained")

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise UserError(f"keep is {self.keep}; expected a share between 0 and 1")

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Draw this step's exits; `run.rng` draws the same on all ranks, and the same after a resume."""
        earlier = torch.rand(run.network.num_exits - 1, generator=run.rng("exits")) < self.keep
        return [*earlier.double().tolist(), 1.0]
