"""Options of a report: the measure of cost, the exit rule and the operating points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from exitkit.errors import UserError
from exitkit.inference.budgets import read_budget
from exitkit.plugins import instantiate, setting

COST_COLUMNS = {"macs": "macs", "papers": "papers", "latency": "milliseconds"}
"""The column of the anytime table that holds each measure of cost."""


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report; each is an option of `exitkit report`, and a key of `report` in a recipe."""

    baseline: str | None = setting(None, "method that differences refer to; none: joint, or else the first")
    cost: Literal["macs", "papers", "latency"] = setting(
        "macs", "measure of cost: multiply-adds, the papers' count of them, or milliseconds measured by `exitkit bench`"
    )
    points: int = setting(39, "number P of operating points of a budgeted curve: shares of q = p / 20 for p = 1 to P")
    rule: Literal["confidence", "margin", "entropy", "patience"] = setting("confidence", "exit rule")
    calibrated: bool = setting(False, "divide each exit's logits by a temperature fitted on validation")
    hold: bool = setting(False, "replace operating points that do not improve validation accuracy by the previous one")
    budgets: tuple[str, ...] = setting(
        (), "average budgets, such as 40M (multiply-adds) or 1.5ms; none: nine evenly spaced ones"
    )
    risk: float = setting(1.0, "largest loss of accuracy of the risk-controlled operating point, in percentage points")
    certainty: float = setting(0.95, "confidence level of the risk control")

    def __post_init__(self) -> None:
        if not 1 <= self.points <= 400:
            raise UserError(f"points is {self.points}; expected 1 to 400")
        if not 0 < self.risk <= 100:
            raise UserError(f"risk is {self.risk}; expected percentage points of accuracy, above 0 and up to 100")
        if not 0 < self.certainty < 1:
            raise UserError(f"certainty is {self.certainty}; expected above 0 and below 1")
        if self.calibrated and self.rule == "patience":
            raise UserError("calibrated has no effect on the rule patience, which counts predictions; omit calibrated")
        for budget in self.budgets:
            in_time = budget.endswith("ms")
            if in_time != (self.cost == "latency"):
                unit = "milliseconds, such as 1.5ms" if self.cost == "latency" else "multiply-adds, such as 40M"
                raise UserError(f"budget {budget} does not fit cost {self.cost}; expected {unit}")
            if not read_budget(budget) > 0:
                raise UserError(f"budget {budget} is not above 0")

    def check_reach(self, least: float) -> None:
        """Check that every budget is at least the cost of an exit.

        Args:
            least: lowest cost of a first exit.

        Raises:
            UserError: a budget is below it.
        """
        for budget in self.budgets:
            if not read_budget(budget) >= least * (1 - 1e-9):
                amount = f"{least:.6g}{'ms' * (self.cost == 'latency')}"
                raise UserError(f"budget {budget} is below the lowest cost of a first exit; expected at least {amount}")

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> ReportOptions:
        """Return options from values.

        Raises:
            UserError: a key is unknown (similar keys are suggested), or a value is invalid.
        """
        options: ReportOptions = instantiate(cls, "report", values)
        return options
