"""Measures of one finished run: accuracy and cost of each exit, operating point and budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from exitkit.benchmarks.report.labels import Names
from exitkit.benchmarks.report.options import ReportOptions
from exitkit.errors import UserError
from exitkit.inference.budgets import exit_costs
from exitkit.inference.calibration import exit_calibration, fit_temperatures, point_calibration
from exitkit.inference.operating_points import held, most_accurate_within, oracle_curve, risk_controlled
from exitkit.inference.scores import patience_thresholds, scores
from exitkit.inference.thresholds import (
    anytime_accuracy,
    correct,
    exit_counts,
    leave_at,
    paper_shares,
    realised,
    share_for_budget,
    thresholds,
)


class FinishedRun(Protocol):
    """The interface of a run for a comparison; `exitkit.RunFolder` implements it."""

    @property
    def path(self) -> Any:
        """Return the run's folder; its name is the name of the run."""

    @property
    def recipe(self) -> Any:
        """Return the recipe of the run; `seed`, `epochs` and `batch_size` are read."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Return the identity of the run, {field: JSON value}; fields of the method are named `method.field`."""

    def outputs(self, part: str) -> Mapping[str, np.ndarray]:
        """Return logits [N, K, C], labels [N] and indices [N] of "validation" or "test"."""

    def costs(self) -> Sequence[Mapping[str, int]]:
        """Return one row per exit: exit (from 1), papers, macs, params."""

    def latency(self) -> Sequence[float]:
        """Return the milliseconds per image until each exit predicts, [K]."""

    def training_images(self) -> int:
        """Return the number of training images, 0 if unknown."""

    def training_cost(self) -> Mapping[str, float]:
        """Return the training time, `seconds`, and the peak memory, `memory_mib`."""


class Points(NamedTuple):
    """Operating points of one run: thresholds [P, K], and their costs and accuracies on validation and test."""

    limits: np.ndarray
    validation_cost: np.ndarray
    validation_accuracy: np.ndarray
    exit_index: np.ndarray
    """[P, N]: index of the exit at which each test sample leaves, from 0."""
    rates: np.ndarray
    """[P, K]: fraction of the test samples that leave at each exit."""
    cost: np.ndarray
    accuracy: np.ndarray
    """[P], percent."""

    def at(self, chosen: np.ndarray) -> Points:
        """Return the points with these indices, in their order."""
        return Points(*(values[chosen] for values in self))


class RunMeasures:
    """Measures one run. Thresholds depend on validation only; test labels are used only to compute accuracies.

    Args:
        run: the run.
        names: its labels.
        options: options of the report.

    Raises:
        UserError: the run has no validation samples.
    """

    def __init__(self, run: FinishedRun, names: Names, options: ReportOptions) -> None:
        self.run, self.names, self.options = run, names, options
        self.validation, self.test = run.outputs("validation"), run.outputs("test")
        if not len(self.validation["labels"]):
            raise UserError(f"{run.path} has no validation samples; thresholds need at least one")
        self.costs = exit_costs(run, options.cost)
        self.temperatures = (
            fit_temperatures(self.validation["logits"], self.validation["labels"]) if options.calibrated else None
        )
        self.scores_val, self.scores_test = (
            scores(part["logits"], options.rule, self.temperatures) for part in (self.validation, self.test)
        )
        self.hits_val, self.hits = (correct(part["logits"], part["labels"]) for part in (self.validation, self.test))
        curve = self.points(paper_shares(options.points))
        self.curve = curve.at(held(curve.validation_accuracy)) if options.hold else curve

    @property
    def same(self) -> dict[str, Any]:
        """The columns with the same value in every row."""
        return {"method": self.names.method, "seed": self.run.recipe.seed, **self.names._asdict()}

    def points(self, q: Iterable[Any]) -> Points:
        """Return the operating points of shares q; for the rule patience, those of 1 to K agreeing exits."""
        samples, exits = self.scores_val.shape
        if self.options.rule == "patience":
            return self._at(patience_thresholds(exits))
        return self._at(thresholds(self.scores_val, exit_counts(samples, exits, q)))

    def _at(self, limits: np.ndarray) -> Points:
        exit_index = leave_at(self.scores_test, limits)
        validation = realised(leave_at(self.scores_val, limits), self.hits_val, self.costs)
        test = realised(exit_index, self.hits, self.costs)
        return Points(
            limits,
            validation.cost,
            100 * validation.accuracy,
            exit_index,
            test.rates,
            test.cost,
            100 * test.accuracy,
        )

    def budgeted(self, budgets: np.ndarray) -> Points:
        """Return one operating point per budget, from the exit shares of BoostNet's equation 9.

        For the rule patience, which has K operating points only, it is the point with the highest validation accuracy
        whose validation cost is within the budget.
        """
        if self.options.rule != "patience":
            return self.points(share_for_budget(self.costs, budgets))
        return self.curve.at(most_accurate_within(self.curve.validation_cost, self.curve.validation_accuracy, budgets))

    def frames(self, budgets: np.ndarray) -> dict[str, pd.DataFrame]:
        """Return the rows of this run per table; rows of budgets below the first exit's cost contain NaN."""
        spent, curve = self.budgeted(budgets), self.curve
        out_of_reach = budgets < self.costs[0] * (1 - 1e-9)
        cost, accuracy = (np.where(out_of_reach, np.nan, values) for values in (spent.cost, spent.accuracy))
        best_cost, best_accuracy = oracle_curve(self.hits, self.costs)
        numbers = range(1, len(curve.cost) + 1)
        exits = range(1, len(self.costs) + 1)
        detail = {"point": numbers, "cost": curve.cost, "accuracy": curve.accuracy}
        detail |= {f"threshold_{k}": curve.limits[:, k - 1] for k in exits[:-1]}
        detail |= {f"share_{k}": curve.rates[:, k - 1] for k in exits}
        return {
            "anytime": anytime_rows(self.run, self.same, self.options.cost),
            "budgeted": pd.DataFrame({**self.same, "budget": budgets, "cost": cost, "accuracy": accuracy}),
            "curve": pd.DataFrame({**self.same, "point": numbers, "cost": curve.cost, "accuracy": curve.accuracy}),
            "points": pd.DataFrame({**self.same, **detail}),
            "oracle": pd.DataFrame({**self.same, "exit": exits, "cost": best_cost, "accuracy": 100 * best_accuracy}),
            "calibration": self._calibration(curve),
            "risk": self._risk(),
            "images": self._images(),
        }

    def _images(self) -> pd.DataFrame:
        parts = {"validation": len(self.validation["labels"]), "test": len(self.test["labels"])}
        classes = self.test["logits"].shape[2]
        return pd.DataFrame([{**self.same, "training": self.run.training_images(), **parts, "classes": classes}])

    def _calibration(self, curve: Points) -> pd.DataFrame:
        exits = exit_calibration(self.test["logits"], self.test["labels"], self.temperatures)
        confidences = scores(self.test["logits"], "confidence", self.temperatures)
        points = point_calibration(confidences, self.hits, curve.exit_index)
        where = [f"exit {k}" for k in range(1, len(exits) + 1)] + [f"point {p}" for p in range(1, len(points) + 1)]
        return pd.DataFrame({**self.same, "where": where, "error": 100 * np.concatenate([exits, points])})

    def _risk(self) -> pd.DataFrame:
        """Return the risk-controlled point: thresholds from one half of the validation set, tests on the other half."""
        limits = self.curve.limits
        even, odd = (slice(start, None, 2) for start in (0, 1))
        if self.options.rule != "patience":
            counts = exit_counts(len(self.scores_val[even]), limits.shape[1], paper_shares(self.options.points))
            limits = thresholds(self.scores_val[even], counts)
        exit_index = leave_at(self.scores_val[odd], limits)
        hits = self.hits_val[odd]
        hits_at_exit = hits[np.arange(len(hits)), exit_index]
        # The order of the tests must not depend on the samples they use, either.
        mean_cost = realised(leave_at(self.scores_val[even], limits), self.hits_val[even], self.costs).cost
        chosen = risk_controlled(
            hits[:, -1], hits_at_exit, mean_cost, self.options.risk / 100, 1 - self.options.certainty
        )
        full = 100 * self.hits[:, -1].mean()
        row = {"point": np.nan, "cost": self.costs[-1], "accuracy": full, "drop": 0.0}
        if chosen is not None:
            point = self._at(limits[[chosen]])
            row = {"point": chosen + 1, "cost": point.cost[0], "accuracy": point.accuracy[0]}
            row["drop"] = full - point.accuracy[0]
        return pd.DataFrame([{**self.same, **row}])


def anytime_rows(run: FinishedRun, same: Mapping[str, Any], cost: str) -> pd.DataFrame:
    """Return one row per exit: exit, papers, macs (and milliseconds), accuracy in percent."""
    test = run.outputs("test")
    rows: dict[str, Any] = {name: [int(row[name]) for row in run.costs()] for name in ("exit", "papers", "macs")}
    if cost == "latency":
        rows["milliseconds"] = exit_costs(run, cost)
    rows["accuracy"] = 100 * anytime_accuracy(test["logits"], test["labels"])
    return pd.DataFrame({**same, **rows})
