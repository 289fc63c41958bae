"""An exit rule: when a sample leaves. What a deployment needs to know besides the network, and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan
from typing import TYPE_CHECKING, Any

from exitkit.errors import UserError, unknown
from exitkit.exit_rules import SCORES, checked_temperatures

if TYPE_CHECKING:
    from exitkit.evaluation import Share
    from exitkit.runs import RunFolder


@dataclass(frozen=True)
class ExitRule:
    """A sample leaves at the first exit whose score reaches that exit's threshold.

    Args:
        score: one of `exit_rules.SCORES`; the larger, the surer.
        thresholds: [K], one an exit; infinity closes an exit, and the last is -infinity: it takes whoever is left.
        temperatures: [K], divide each exit's logits first; None: 1 everywhere.

    Raises:
        UserError: no such score, thresholds that end otherwise or hold a NaN, temperatures that are not positive, or
            such for patience, which they can't change.
    """

    score: str
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise unknown("exit rule", self.score, SCORES)
        limits = tuple(float(value) for value in self.thresholds)
        if not limits or limits[-1] != -inf or any(map(isnan, limits)):
            raise UserError(f"thresholds {list(limits)}; expected one an exit, the last -infinity, which takes all")
        object.__setattr__(self, "thresholds", limits)
        if self.temperatures is None:
            return
        if self.score == "patience":
            raise UserError("patience counts predictions, which no temperature changes; leave temperatures out")
        heat = checked_temperatures(self.temperatures, len(limits))
        object.__setattr__(self, "temperatures", tuple(heat.tolist()))

    @property
    def num_exits(self) -> int:
        """K, the number of exits."""
        return len(self.thresholds)

    def temperature(self, index: int) -> float:
        """Return the temperature of exit `index`, from 0."""
        return 1.0 if self.temperatures is None else self.temperatures[index]

    @classmethod
    def from_run(
        cls,
        run: RunFolder | str,
        *,
        budget: float | str | None = None,
        share: Share | None = None,
        score: str = "confidence",
        calibrated: bool = False,
    ) -> ExitRule:
        """Find the thresholds of a finished run, on its stored validation outputs alone.

        Args:
            run: the run, or its folder.
            budget: average cost of an image: multiply-adds (`40e6`, `"40M"`), or milliseconds that `exitkit bench` has
                measured (`"1.5ms"`); the shares of the exits come from BoostNet's equation 9.
            share: instead, the ratio q between the shares of neighbouring exits. With neither: the cheapest of the
                papers' operating points that loses nothing against the last exit.
            score: one of `exit_rules.SCORES`.
            calibrated: divide each exit's logits by a temperature fitted on the validation samples first.

        Raises:
            UserError: no such run, an unfinished one, a budget below the first exit's cost, or both kinds of wish.
        """
        from exitkit.inference.choice import choose

        return choose(run, budget=budget, share=share, score=score, calibrated=calibrated)

    def to_json(self) -> dict[str, Any]:
        """Return the rule as plain values; infinities are words, since JSON has no such numbers."""
        words = {inf: "inf", -inf: "-inf"}
        return {
            "score": self.score,
            "thresholds": [words.get(value, value) for value in self.thresholds],
            "temperatures": None if self.temperatures is None else list(self.temperatures),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ExitRule:
        """Read what `to_json` gave; other keys are left alone.

        Raises:
            UserError: a key is missing, or a value is no number.
        """
        missing = [key for key in ("score", "thresholds") if key not in values]
        if missing:
            raise UserError(f"an exit rule without {missing[0]}; expected what ExitRule.to_json gives")
        heat = values.get("temperatures")
        try:
            return cls(values["score"], _numbers(values["thresholds"]), None if heat is None else _numbers(heat))
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, UserError) else UserError(f"an exit rule is damaged: {error}") from None


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
