"""The learning rate as a pure function of the position in the schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exitkit.recipe import Recipe
    from exitkit.run import Position


def learning_rate(recipe: Recipe, at: Position) -> float:
    """Return the learning rate: cosine falls with every step, `step` drops at the first epoch past each milestone."""
    assert recipe.lr is not None
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * at.fraction))
    passed = sum(at.epoch / at.epochs >= milestone for milestone in recipe.milestones or ())
    return recipe.lr * recipe.decay**passed
