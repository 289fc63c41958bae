"""Targets: what an operating point must reach, in the words in which people say it.

| words | the chosen point |
|---|---|
| budget 40M, 60%, 1.5ms | a rule of this mean cost (60%: of the last exit's); the most accurate policy within it |
| latency 5ms | the same, in milliseconds as measured by `exitkit bench` |
| latency-p95 5ms | the most accurate one of which 95 % of the images take at most this time |
| lose 1 | the lowest-cost one that loses at most 1 percentage point of accuracy against the full network |
| accuracy 75 | the lowest-cost one with at least this accuracy, in percent |

`certainty` makes `lose` a guarantee: with this probability, the loss on new images is below the given one (risk
control, see `exitkit.inference.risk`). `at_most` makes a budget a bound: the upper confidence limit of the mean cost of
new images is at most the budget.

Everything is computed on validation outputs. Shapes: N samples, K exits, P operating points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exitkit.errors import UserError, unknown
from exitkit.inference.budgets import read_budget
from exitkit.inference.operating_points import most_accurate_within
from exitkit.inference.risk import controlled_point, samples_needed
from exitkit.inference.thresholds import Floats

Kind = Literal["budget", "latency-p95", "lose", "accuracy"]
BOUND = 0.95
"""Confidence level of the upper limit of `at_most`."""
QUANTILE = 0.95
_TEST = "betting"
_WORDS = ("budget", "latency", "latency_p95", "lose", "accuracy", "certainty", "at_most")


def _number(name: str, value: Any) -> float:
    """Return a number that a script gives, perhaps as text or as an array of one element.

    Raises:
        UserError: it is something else.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {value!r}; expected a number") from None


@dataclass(frozen=True)
class Target:
    """What an operating point must reach.

    Attributes:
        kind: which of the words above; `latency` is a budget in milliseconds.
        value: cost, share of the last exit's cost, milliseconds, or percentage points.
        text: the target as it was given, for messages.
        unit: "macs" or "latency", the unit of the costs that it is about.
        relative: whether `value` is a share of the last exit's cost.
        certainty: probability of a guarantee, for `lose`; None: no guarantee.
        at_most: whether a budget is a bound.
    """

    kind: Kind
    value: float
    text: str
    unit: str = "macs"
    relative: bool = False
    certainty: float | None = None
    at_most: bool = False

    @classmethod
    def of(
        cls,
        *,
        budget: float | str | None = None,
        latency: float | str | None = None,
        latency_p95: float | str | None = None,
        lose: float | None = None,
        accuracy: float | None = None,
        certainty: float | None = None,
        at_most: bool = False,
        **others: Any,
    ) -> Target | None:
        """Return the target that is given, or None if none is.

        Raises:
            UserError: two targets are given, one is unknown (`others`), a value is impossible, or `certainty` or
                `at_most` has no effect on it.
        """
        for name in others:
            raise unknown("target", name, _WORDS)
        given = {
            name: value
            for name, value in (
                *(("budget", budget), ("latency", latency), ("latency-p95", latency_p95)),
                *(("lose", lose), ("accuracy", accuracy)),
            )
            if value is not None
        }
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are given; expected one of them")
        if certainty is not None and lose is None:
            raise UserError("certainty is given without lose; expected, for example, lose 1 with certainty 0.95")
        if certainty is not None and not 0 < 1 - (certainty := _number("certainty", certainty)) < 1:
            raise UserError(f"certainty is {certainty:g}; expected a probability between 0 and 1, both excluded")
        if not isinstance(at_most, bool | np.bool_):
            raise UserError(f"at_most is {at_most!r}; expected True or False")
        if at_most and not given.keys() & {"budget", "latency"}:
            raise UserError("at-most is given without a budget; expected, for example, budget 60% with at-most")
        if not given:
            return None
        ((name, value),) = given.items()
        if name in ("lose", "accuracy"):
            points = _number(name, value)
            if not 0 <= points <= 100:
                raise UserError(f"{name} is {value}; expected percentage points, 0 to 100")
            return cls("lose" if name == "lose" else "accuracy", points, f"{name} {points:g}", certainty=certainty)
        kind: Kind = "budget" if name in ("budget", "latency") else "latency-p95"
        return cls._cost(kind, name, value, at_most)

    @classmethod
    def _cost(cls, kind: Kind, name: str, value: float | str, at_most: bool) -> Target:
        text = f"{name} {value}"
        if isinstance(value, str) and value.endswith("%"):
            if name != "budget":
                raise UserError(f"{name} is {value}; expected milliseconds, such as 5ms")
            try:
                share = float(value[:-1]) / 100
            except ValueError:
                share = 0.0
            if not 0 < share <= 1:
                raise UserError(f"budget is {value}; expected a share of the last exit's cost, above 0% and up to 100%")
            return cls(kind, share, text, relative=True, at_most=at_most)
        if name != "budget" and isinstance(value, str) and not value.endswith("ms"):
            raise UserError(f"{name} is {value}; expected milliseconds, such as 5ms")
        cost = read_budget(value, name) if isinstance(value, str) else _number(name, value)
        in_time = name != "budget" or (isinstance(value, str) and value.endswith("ms"))
        return cls(kind, cost, text, "latency" if in_time else "macs", at_most=at_most)

    @property
    def words(self) -> str:
        """The target with its certainty or bound, as in a report: lose 1 certainty 0.95, budget 60% at-most."""
        certain = "" if self.certainty is None else f" certainty {self.certainty:g}"
        return f"{self.text}{certain}{' at-most' if self.at_most else ''}"

    def cost(self, costs: Floats) -> float:
        """Return the value of a budget or a latency, in the unit of `costs` [K].

        Raises:
            UserError: it is below the cost of the first exit.
        """
        value = self.value * float(costs[-1]) if self.relative else self.value
        if not value >= costs[0] * (1 - 1e-9):  # a share of the costs is rounded
            share = f" ({100 * costs[0] / costs[-1]:.3g}%)" if self.kind == "budget" else ""
            least = f"{costs[0]:.6g}{share}"
            raise UserError(f"{self.text} is below the first exit's cost; expected at least {least}")
        return max(value, float(costs[0]))

    def check_certain(self, samples: int) -> None:
        """Check that there are enough samples for a guarantee.

        Raises:
            UserError: there are too few; the message says how many are needed.
        """
        if self.certainty is None:
            return
        needed = 2 * samples_needed(_TEST, self.value / 100, 1 - self.certainty) if self.value else None
        if needed is None or samples < needed:
            wanted = f"at least {needed} (half of them choose the thresholds)" if needed else "a loss above 0"
            raise UserError(
                f"{self.text} with certainty {self.certainty:g} can't be shown with {samples} validation images; "
                f"expected {wanted}"
            )


@dataclass(frozen=True)
class Candidates:
    """Operating points to choose from, on validation.

    Attributes:
        costs: cumulative cost of each exit, [K].
        leaves: exit (0-based) where each sample leaves, [P, N].
        hits: whether it is right there, [P, N].
        full: whether the full network is right, [N].
        order_cost: mean cost of the points on other samples, [P], for a guarantee; None: on these.
    """

    costs: Floats
    leaves: NDArray[np.integer[Any]]
    hits: np.ndarray
    full: np.ndarray
    order_cost: Floats | None = None

    @property
    def mean_cost(self) -> Floats:
        """Mean cost of each point, [P]."""
        mean: Floats = np.asarray(self.costs, dtype=np.float64)[self.leaves].mean(axis=1)
        return mean

    @property
    def accuracy(self) -> Floats:
        """Accuracy of each point, [P], 0..1."""
        share: Floats = self.hits.mean(axis=1)
        return share

    def upper_cost(self, level: float = BOUND) -> Floats:
        """Return the upper confidence limit of the mean cost of new images, [P]: Student's, one-sided."""
        # Imported when used: scipy takes a second to load.
        from scipy import stats

        spent = np.asarray(self.costs, dtype=np.float64)[self.leaves]
        samples = spent.shape[1]
        if samples < 2:
            return np.full(len(spent), np.inf)
        quantile = float(stats.t.ppf(level, samples - 1))
        # The mean cost of all images, of which the validation images are a sample.
        limit: Floats = spent.mean(axis=1) + quantile * spent.std(axis=1, ddof=1) / np.sqrt(samples)
        return limit


def choose_point(target: Target, candidates: Candidates) -> int:
    """Return the operating point that a target asks for.

    Args:
        target: the target.
        candidates: the points; for a target with a certainty, the points must have been made from other samples.

    Raises:
        UserError: no point reaches the target; the message says what can be reached.
    """
    cost, accuracy = candidates.mean_cost, candidates.accuracy
    if target.kind == "lose" and target.certainty is not None:
        return _certain(target, candidates)
    if target.kind in ("lose", "accuracy"):
        full = candidates.full.mean()
        least = full - target.value / 100 if target.kind == "lose" else target.value / 100
        enough = accuracy >= least - 1e-12
        if not enough.any():
            raise UserError(
                f"{target.text} is not reached by any operating point; the most accurate has "
                f"{100 * accuracy.max():.2f}, and the full network {100 * full:.2f}, on validation"
            )
        return int(np.where(enough, cost, np.inf).argmin())
    bound = target.cost(candidates.costs)
    if target.kind == "latency-p95":
        spent = np.asarray(candidates.costs, dtype=np.float64)[candidates.leaves]
        reached = np.quantile(spent, QUANTILE, axis=1, method="higher")
    else:
        reached = candidates.upper_cost() if target.at_most else cost
    within = reached <= bound * (1 + 1e-9)
    if not within.any():
        raise UserError(f"{target.text} is not met by any operating point; expected at least {reached.min():.6g}")
    if target.kind == "budget" and not target.at_most:  # as `exitkit policies` chooses it
        (point,) = most_accurate_within(reached, accuracy, [bound * (1 + 1e-9)])
        return int(point)
    best = within & (accuracy == accuracy[within].max())
    return int(np.where(best, cost, np.inf).argmin())


def _certain(target: Target, candidates: Candidates) -> int:
    losses = candidates.full.astype(np.float64) - candidates.hits
    order = candidates.mean_cost if candidates.order_cost is None else candidates.order_cost
    assert target.certainty is not None
    chosen = controlled_point(losses, order, target.value / 100, 1 - target.certainty, _TEST)
    if chosen is None:
        raise UserError(
            f"{target.text} with certainty {target.certainty:g} can't be shown for any operating point with "
            f"{len(candidates.full)} images; expected a larger loss, a lower certainty, or more validation images"
        )
    return chosen


def promised(candidates: Candidates, point: int) -> dict[str, Any]:
    """Return cost, accuracies (percent) and exit shares of one point, on the samples of the candidates."""
    exits = len(candidates.costs)
    shares = np.bincount(candidates.leaves[point], minlength=exits) / candidates.leaves.shape[1]
    return {
        "cost": float(candidates.mean_cost[point]),
        "accuracy": 100 * float(candidates.accuracy[point]),
        "full_accuracy": 100 * float(candidates.full.mean()),
        "shares": [float(share) for share in shares],
    }
