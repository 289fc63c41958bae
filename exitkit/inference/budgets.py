"""Costs of the exits of a run, and parsing of budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Protocol

import numpy as np

from exitkit.errors import UserError

UNITS = {"K": 1e3, "M": 1e6, "G": 1e9}


class Costed(Protocol):
    """Interface of a run with costs; `exitkit.RunFolder` implements it."""

    def costs(self) -> Sequence[Mapping[str, int]]:
        """Return one row per exit: exit (from 1), papers, macs, params."""

    def latency(self) -> Sequence[float]:
        """Return the milliseconds until the prediction of each exit."""


def exit_costs(run: Costed, cost: str) -> np.ndarray:
    """Return the cost of leaving at each exit, [K], in multiply-adds (`macs`, `papers`) or milliseconds (`latency`).

    Raises:
        UserError: the latency of the run was not measured.
    """
    if cost == "latency":
        # Noise may make a later exit appear faster, which is impossible: it includes the work of the earlier ones.
        return np.maximum.accumulate(np.asarray(run.latency(), dtype=np.float64))
    return np.array([row[cost] for row in run.costs()], dtype=np.int64)


def read_budget(text: str, name: str = "budget") -> float:
    """Return the value of a budget: `40M`, `1.5G` or `123456` in multiply-adds, `1.5ms` in milliseconds.

    Args:
        text: the budget.
        name: what it is, for the error message.

    Raises:
        UserError: the text is neither.
    """
    number = text.removesuffix("ms")
    size = UNITS.get(number[-1:].upper(), 1.0) if number == text else 1.0
    try:
        budget = float(number[:-1] if size > 1 else number) * size
    except ValueError:
        budget = nan
    if not (isfinite(budget) and budget > 0):
        raise UserError(f"{name} {text!r} is not a cost; expected one such as 40M, 1.5G or 2.5ms")
    return budget
