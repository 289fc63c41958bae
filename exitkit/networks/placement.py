"""Placement of exits on a chain, at given shares of its cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from numbers import Real

from exitkit.errors import UserError


def place(costs: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """Return, for each share of the total cost, the unit after which the cumulative cost is nearest to it.

    Args:
        costs: multiply-adds of each unit of the chain, in order; no exit is placed after the last unit.
        fractions: shares between 0 and 1, ascending.

    Returns:
        ascending indices of units, one per fraction.

    Raises:
        UserError: `fractions` are not ascending shares, or two of them give the same unit.
    """
    if isinstance(fractions, str) or not isinstance(fractions, Sequence):
        raise UserError(f"fractions is {fractions!r}; expected a list of shares, such as [0.25, 0.5]")
    if not all(isinstance(share, Real) for share in fractions):
        raise UserError(f"fractions is {list(fractions)}; expected shares between 0 and 1, such as [0.25, 0.5]")
    text = ", ".join(f"{share:g}" for share in fractions)
    if not fractions or list(fractions) != sorted(set(fractions)) or not 0 < fractions[0] <= fractions[-1] < 1:
        raise UserError(f"fractions is {text or 'empty'}; expected ascending shares between 0 and 1, such as 0.25, 0.5")
    cumulative = [cost / sum(costs) for cost in accumulate(costs)][:-1]
    if len(cumulative) < len(fractions):
        raise UserError(f"fractions is {text}; expected at most {len(cumulative)} shares, one per possible place")
    placed = [min(range(len(cumulative)), key=lambda unit: abs(cumulative[unit] - share)) for share in fractions]
    for first, second in pairwise(range(len(placed))):
        if placed[first] == placed[second]:
            possible = ", ".join(f"{share:.2f}" for share in cumulative)
            raise UserError(
                f"fractions {fractions[first]:g} and {fractions[second]:g} give the same place; "
                f"possible shares are {possible}"
            )
    return placed
