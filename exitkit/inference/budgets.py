"""What leaving at each exit of a run costs, and budgets as a person writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from exitkit.errors import UserError

UNITS = {"K": 1e3, "M": 1e6, "G": 1e9}


class Costed(Protocol):
    """What this needs of a run; `exitkit.RunFolder` has it."""

    def costs(self) -> Sequence[Mapping[str, int]]:
        """Return one row an exit: exit (from 1), papers, macs, params."""

    def latency(self) -> Sequence[float]:
        """Return the milliseconds until each exit answers."""


def exit_costs(run: Costed, cost: str) -> np.ndarray:
    """Return what leaving at each exit costs, [K], in multiply-adds (`macs`, `papers`) or milliseconds (`latency`).

    Raises:
        UserError: milliseconds of a run that was not measured.
    """
    if cost == "latency":
        # A measurement may say that a later exit is faster; it can't be, since it does all that the earlier does.
        return np.maximum.accumulate(np.asarray(run.latency(), dtype=np.float64))
    return np.array([row[cost] for row in run.costs()], dtype=np.int64)


def read_budget(text: str) -> float:
    """Read `40M`, `1.5G` or `123456` as multiply-adds, `1.5ms` as milliseconds.

    Raises:
        UserError: it is neither.
    """
    number = text.removesuffix("ms")
    size = UNITS.get(number[-1:].upper(), 1.0) if number == text else 1.0
    try:
        return float(number[:-1] if size > 1 else number) * size
    except ValueError:
        raise UserError(f"budget {text!r} is no amount; expected such as 40M, 1.5G or 2.5ms") from None
