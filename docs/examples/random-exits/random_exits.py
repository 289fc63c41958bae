"""Random exits: each step trains the last exit, and each other exit at random.

Paper: none; this is the example of exitkit's documentation. Nothing differs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from exitkit.strategy import EXIT_WEIGHTS, Run, TrainingStrategy, UserError, setting


@dataclass(eq=False)
class RandomExits(TrainingStrategy):
    """Random exits: a random share of the steps trains each earlier exit."""

    slots = frozenset({EXIT_WEIGHTS})
    paper = "the example of exitkit's documentation"

    keep: float = setting(0.5, "share of the steps that train an earlier exit")

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise UserError(f"keep is {self.keep}; expected a share between 0 and 1")

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Draw the exits of this step, alike on all ranks and after a resume."""
        draws = torch.rand(run.network.num_exits - 1, generator=run.rng("exits"))
        earlier = draws < self.keep
        return [*earlier.double().tolist(), 1.0]
