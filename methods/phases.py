"""Helpers of methods with several phases: training of some exits, and splitting of the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from exitkit.escaping import counted
from exitkit.strategy import EXIT_WEIGHTS, Run, TrainingStrategy, UserError, setting


@dataclass(eq=False)
class Chosen(TrainingStrategy):
    """Joint training of some of the exits."""

    slots: ClassVar[frozenset[str]] = frozenset({EXIT_WEIGHTS})

    exits: tuple[int, ...] = setting((), "exits that are trained, from 0")
    weight: float = setting(1.0, "weight of each of these exits", added=True)

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Return the weight for the chosen exits and 0 for the others."""
        return [self.weight if index in self.exits else 0.0 for index in range(run.network.num_exits)]


def split_epochs(epochs: int, shares: Sequence[float], name: str) -> list[int]:
    """Return the number of epochs of each phase, in proportion to the shares, at least one per phase.

    Args:
        epochs: total number of epochs.
        shares: one number above 0 per phase.
        name: name of the training, for the message.

    Raises:
        UserError: there are fewer epochs than phases.
    """
    count = len(shares)
    if epochs < count:
        raise UserError(
            f"{name} has {counted(count, 'phase')} and {counted(epochs, 'epoch')}; "
            "expected at least one epoch per phase"
        )
    bounds = [round(epochs * sum(shares[: index + 1]) / sum(shares)) for index in range(count)]
    lengths = [after - before for before, after in zip([0, *bounds], bounds, strict=False)]
    while 0 in lengths:
        lengths[lengths.index(max(lengths))] -= 1
        lengths[lengths.index(0)] += 1
    return lengths
