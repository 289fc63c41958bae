"""Where exits stand on a chain: at given shares of its cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from exitkit.errors import UserError


def place(costs: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """Return, for each share of the whole cost, the unit behind which the cost so far is nearest to it.

    Args:
        costs: multiply-adds of each unit of the chain, in order; no exit is placed behind the last.
        fractions: shares between 0 and 1, ascending.

    Returns:
        indices of units, ascending, as many as there are fractions.

    Raises:
        UserError: shares that are no such list, or two that fall on one unit.
    """
    text = ", ".join(f"{share:g}" for share in fractions)
    if not fractions or list(fractions) != sorted(set(fractions)) or not 0 < fractions[0] <= fractions[-1] < 1:
        raise UserError(f"fractions is {text or 'empty'}; expected ascending shares between 0 and 1, such as 0.25, 0.5")
    behind = [cost / sum(costs) for cost in accumulate(costs)][:-1]
    if len(behind) < len(fractions):
        raise UserError(f"{len(fractions)} exits were asked for, and there are {len(behind)} places for them")
    placed = [min(range(len(behind)), key=lambda unit: abs(behind[unit] - share)) for share in fractions]
    for first, second in pairwise(range(len(placed))):
        if placed[first] == placed[second]:
            possible = ", ".join(f"{share:.2f}" for share in behind)
            raise UserError(
                f"fractions {fractions[first]:g} and {fractions[second]:g} fall on one place; "
                f"possible shares are {possible}"
            )
    return placed
