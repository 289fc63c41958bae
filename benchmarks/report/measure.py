"""Measures of one finished run: accuracy and cost of each exit, operating point and budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from exitkit.benchmarks.report.options import ReportOptions
from exitkit.benchmarks.report.targets import target_rows
from exitkit.errors import UserError
from exitkit.inference.budgets import exit_costs
from exitkit.inference.calibration import exit_calibration, fit_temperatures, point_calibration
from exitkit.inference.operating_points import held, most_accurate_within, oracle_curve
from exitkit.inference.risk import risk_controlled
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
from exitkit.runs.classes import ClassHits


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

    def embeddings(self, part: str) -> Sequence[np.ndarray]:
        """Return the embeddings of each exit, [N, d_k]; called only for exit policies that read them."""

    def curvature(self) -> Mapping[str, np.ndarray]:
        """Return the curvature of the exits' last layers; called only with `embeddings`."""

    def costs(self) -> Sequence[Mapping[str, int]]:
        """Return one row per exit: exit (from 1), papers, macs, params."""

    def latency(self) -> Sequence[float]:
        """Return the milliseconds per image until each exit predicts, [K]."""

    def probes(self) -> Mapping[str, np.ndarray]:
        """Return the measurements on a fixed batch during training, see `exitkit.training.probe`; {} if none."""

    def training_images(self) -> int:
        """Return the number of training images, 0 if unknown."""

    def class_names(self) -> Sequence[str]:
        """Return the names of the classes; called only if the recall of each class is requested."""

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


class Measured(NamedTuple):
    """What a report needs of one run."""

    samples: str
    """Digest of the indices of the test samples."""
    tables: dict[str, pd.DataFrame]
    """The rows of this run in each table of the report, without the columns that label the run."""


class RunMeasures:
    """Measures one run. Thresholds depend on validation only; test labels are used only to compute accuracies.

    Args:
        run: the run.
        options: options of the report.

    Raises:
        UserError: the run has no validation samples.
    """

    def __init__(self, run: FinishedRun, options: ReportOptions) -> None:
        self.run, self.options = run, options
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
        self.counted = ClassHits.count(self.test["logits"], self.test["labels"])
        self.hits_val, self.hits = (correct(part["logits"], part["labels"]) for part in (self.validation, self.test))
        curve = self.points(paper_shares(options.points))
        self.curve = curve.at(held(curve.validation_accuracy)) if options.hold else curve

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

    def tables(self, budgets: np.ndarray) -> dict[str, pd.DataFrame]:
        """Return the rows of this run per table; rows of budgets below the first exit's cost contain NaN."""
        spent, curve = self.budgeted(budgets), self.curve
        out_of_reach = budgets < self.costs[0] * (1 - 1e-9)
        cost, accuracy = (np.where(out_of_reach, np.nan, values) for values in (spent.cost, spent.accuracy))
        planned = np.where(out_of_reach, np.nan, spent.validation_cost)
        best_cost, best_accuracy = oracle_curve(self.hits, self.costs)
        numbers = range(1, len(curve.cost) + 1)
        exits = range(1, len(self.costs) + 1)
        detail = {"point": numbers, "cost": curve.cost, "accuracy": curve.accuracy}
        detail |= {f"threshold_{k}": curve.limits[:, k - 1] for k in exits[:-1]}
        detail |= {f"share_{k}": curve.rates[:, k - 1] for k in exits}
        return self._policies(budgets) | {
            "anytime": self._anytime(),
            "budgeted": pd.DataFrame({"budget": budgets, "cost": cost, "accuracy": accuracy}),
            "spent": pd.DataFrame({"budget": budgets, "validation": planned, "test": cost}),
            "curve": pd.DataFrame({"point": numbers, "cost": curve.cost, "accuracy": curve.accuracy}),
            "points": pd.DataFrame(detail),
            "oracle": pd.DataFrame({"exit": exits, "cost": best_cost, "accuracy": 100 * best_accuracy}),
            "calibration": self._calibration(curve),
            "risk": self._risk(),
            "balanced": self._balanced(),
            **({"recall": self._recall()} if self.options.classes else {}),
            **({"targets": self._targets()} if self.options.targets else {}),
            "images": self._images(),
            "stitch": pd.DataFrame(
                {
                    "validation_cost": curve.validation_cost,
                    "validation_accuracy": curve.validation_accuracy,
                    "cost": curve.cost,
                    "accuracy": curve.accuracy,
                }
            ),
        }

    def _targets(self) -> pd.DataFrame:
        """Return one row per target, by the exit rule of the report; see `target_rows`."""
        options = self.options
        return target_rows(self.run, options.targets, options.rule, options.calibrated)

    def _anytime(self) -> pd.DataFrame:
        """Return one row per exit: exit, papers, macs (and milliseconds), accuracy in percent."""
        costs = self.run.costs()
        rows: dict[str, Any] = {name: [int(row[name]) for row in costs] for name in ("exit", "papers", "macs")}
        if self.options.cost == "latency":
            rows["milliseconds"] = self.costs
        rows["accuracy"] = 100 * anytime_accuracy(self.test["logits"], self.test["labels"])
        return pd.DataFrame(rows)

    def _policies(self, budgets: np.ndarray) -> dict[str, pd.DataFrame]:
        chosen = self.options.policies()
        if not chosen:
            return {}
        # Imported when used: most reports compare no policies, and need no torch.
        from exitkit.benchmarks.report.policies import Outputs, run_tables

        return run_tables(Outputs.of_run(self.run, self.costs.astype(float), chosen), chosen, budgets)

    def _images(self) -> pd.DataFrame:
        parts = {"validation": len(self.validation["labels"]), "test": len(self.test["labels"])}
        classes = self.test["logits"].shape[2]
        return pd.DataFrame([{"training": self.run.training_images(), **parts, "classes": classes}])

    def _balanced(self) -> pd.DataFrame:
        """Return the balanced accuracy of each exit, beside that of answers which ignore the image."""
        counted = self.counted
        return pd.DataFrame(
            {
                "exit": range(1, len(self.costs) + 1),
                "balanced": counted.balanced,
                "majority": counted.majority,
                "chance": counted.chance,
                "learned": counted.learned,
            }
        )

    def _recall(self) -> pd.DataFrame:
        """Return the recall of each class at each exit."""
        names, present = self.run.class_names(), np.flatnonzero(self.counted.images)
        frames = [
            pd.DataFrame(
                {
                    "class": [names[label] for label in present.tolist()],
                    "images": self.counted.images[present],
                    "exit": number,
                    "recall": recall[present],
                }
            )
            for number, recall in enumerate(self.counted.recall, 1)
        ]
        return pd.concat(frames, ignore_index=True)

    def _calibration(self, curve: Points) -> pd.DataFrame:
        exits = exit_calibration(self.test["logits"], self.test["labels"], self.temperatures)
        confidences = scores(self.test["logits"], "confidence", self.temperatures)
        points = point_calibration(confidences, self.hits, curve.exit_index)
        where = [f"exit {k}" for k in range(1, len(exits) + 1)] + [f"point {p}" for p in range(1, len(points) + 1)]
        return pd.DataFrame({"where": where, "error": 100 * np.concatenate([exits, points])})

    def _risk(self) -> pd.DataFrame:
        """Return the risk-controlled point: thresholds from one half of the validation set, tests on the other half.

        The temperatures, too, are from the first half.
        """
        values, of_test, rule = self.scores_val, self.scores_test, self.options.rule
        even, odd = (slice(start, None, 2) for start in (0, 1))
        if self.options.calibrated:
            heat = fit_temperatures(self.validation["logits"][even], self.validation["labels"][even])
            values, of_test = (scores(part["logits"], rule, heat) for part in (self.validation, self.test))
        samples, exits = values[even].shape
        if rule == "patience":
            limits = patience_thresholds(exits)
        else:
            limits = thresholds(values[even], exit_counts(samples, exits, paper_shares(self.options.points)))
        exit_index = leave_at(values[odd], limits)
        hits = self.hits_val[odd]
        hits_at_exit = hits[np.arange(len(hits)), exit_index]
        # The order of the tests must not depend on the samples they use, either.
        mean_cost = realised(leave_at(values[even], limits), self.hits_val[even], self.costs).cost
        chosen = risk_controlled(
            hits[:, -1], hits_at_exit, mean_cost, self.options.risk / 100, 1 - self.options.certainty
        )
        full = 100 * self.hits[:, -1].mean()
        row = {"point": np.nan, "cost": self.costs[-1], "accuracy": full, "drop": 0.0}
        if chosen is not None:
            point = realised(leave_at(of_test, limits[[chosen]]), self.hits, self.costs)
            row = {"point": chosen + 1, "cost": point.cost[0], "accuracy": 100 * point.accuracy[0]}
            row["drop"] = full - row["accuracy"]
        return pd.DataFrame([row])
