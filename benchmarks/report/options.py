"""Options of a report: the measure of cost, the exit rule and the operating points."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from exitkit.errors import Note, UserError
from exitkit.inference.budgets import read_budget
from exitkit.plugins import instantiate, setting

if TYPE_CHECKING:
    from exitkit.inference.policy import PolicyName

PAPER_POINTS = 39
"""Number of operating points of a curve in the papers."""

COST_COLUMNS = {"macs": "macs", "papers": "papers", "latency": "milliseconds"}
"""The column of the anytime table that holds each measure of cost."""


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report; each is an option of `exitkit report`, and a key of `report` in a recipe."""

    baseline: str | None = setting(None, "method that differences refer to; none: joint, or else the first")
    cost: Literal["macs", "papers", "latency"] = setting(
        "macs", "measure of cost: multiply-adds, the papers' count of them, or milliseconds measured by `exitkit bench`"
    )
    points: int = setting(
        PAPER_POINTS, "number P of operating points of a budgeted curve: shares of q = p / 20 for p = 1 to P"
    )
    rule: Literal["confidence", "margin", "entropy", "patience"] = setting("confidence", "exit rule")
    calibrated: bool = setting(False, "divide each exit's logits by a temperature fitted on validation")
    hold: bool = setting(False, "replace operating points that do not improve validation accuracy by the previous one")
    budgets: tuple[str, ...] = setting(
        (), "average budgets, such as 40M (multiply-adds) or 1.5ms; none: nine evenly spaced ones"
    )
    policy: tuple[str, ...] = setting(
        (), "exit policies to compare on every method, such as mie+stopping; all: those that replace one part"
    )
    targets: tuple[str, ...] = setting(
        (),
        "operating points: budget 60%, budget 20M at-most, latency 5ms, lose 1 certainty 0.95, accuracy 75",
    )
    risk: float = setting(1.0, "largest loss of accuracy of the risk-controlled operating point, in percentage points")
    certainty: float = setting(0.95, "confidence level of the risk control")
    classes: bool = setting(False, "also report the recall of every class")
    times: bool = setting(True, "report training times and peak memory; false if the runs shared their cores")

    def __post_init__(self) -> None:
        if not 1 <= self.points <= 400:
            raise UserError(f"points is {self.points}; expected 1 to 400")
        if not 0 < self.risk <= 100:
            raise UserError(f"risk is {self.risk}; expected percentage points of accuracy, above 0 and up to 100")
        if not 0 < 1 - self.certainty < 1:
            raise UserError(f"certainty is {self.certainty}; expected above 0 and below 1")
        if self.calibrated and self.rule == "patience":
            raise UserError("calibrated has no effect on the rule patience, which counts predictions; omit calibrated")
        if self.rule == "patience" and self.points != PAPER_POINTS:
            raise UserError("points has no effect on the rule patience, which has one point per exit; omit points")
        if self.policy:
            self.policies()
        # Imported when used: it imports the module of this class.
        from exitkit.benchmarks.report.targets import read_target

        _check_different("target", self.targets, read_target)
        for budget in self.budgets:
            in_time = budget.endswith("ms")
            if in_time != (self.cost == "latency"):
                unit = "milliseconds, such as 1.5ms" if self.cost == "latency" else "multiply-adds, such as 40M"
                raise UserError(f"budget {budget} does not fit cost {self.cost}; expected {unit}")
        _check_different("budget", self.budgets, read_budget)

    def policies(self) -> tuple[PolicyName, ...]:
        """Return the policies to compare, with plain confidence first; none if `policy` is empty.

        Raises:
            UserError: a name is wrong.
        """
        if not self.policy:
            return ()
        # Imported when used: most reports compare no policies, and need no torch.
        from exitkit.benchmarks.report.policies import policies

        return policies(names=self.policy)

    @property
    def reads_embeddings(self) -> bool:
        """Whether a policy needs the stored embeddings of the runs."""
        return any(policy.reads_embeddings for policy in self.policies())

    def check_reach(self, least: float, most: float) -> None:
        """Check that every budget is between the costs of the exits; one above them all gives a `Note`.

        Args:
            least: lowest cost of a first exit.
            most: highest cost of a last exit.

        Raises:
            UserError: a budget is below the lowest cost.
        """
        unit = "ms" * (self.cost == "latency")
        for budget in self.budgets:
            value = read_budget(budget)
            if not value >= least * (1 - 1e-9):
                expected = f"expected at least {least:.6g}{unit}"
                raise UserError(f"budget {budget} is below the lowest cost of a first exit; {expected}")
            if value > most * (1 + 1e-9):
                text = f"budget {budget} is above the cost of every last exit, which is at most {most:.6g}{unit}"
                warnings.warn(Note(f"{text}: every run is its full network there"), stacklevel=2)

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> ReportOptions:
        """Return options from values.

        Raises:
            UserError: a key is unknown (similar keys are suggested), or a value is invalid.
        """
        options: ReportOptions = instantiate(cls, "report", values)
        return options


def _check_different(kind: str, texts: Sequence[str], read: Callable[[str], Any]) -> None:
    """Raise UserError if two texts have the same value."""
    first: dict[Any, str] = {}
    for text in texts:
        value = read(text)
        if value in first:
            both = text if text == first[value] else f"{first[value]} and {text}"
            raise UserError(f"{kind} {both} is given twice; expected each {kind} once")
        first[value] = text
