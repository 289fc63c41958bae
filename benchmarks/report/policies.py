"""Exit policies compared on stored outputs, without training.

A policy is a combination of exits, a score and a rule. The baseline is plain confidence with the shares of the papers.
Everything is fitted on validation outputs; the operating point of a budget is selected by cross-fitted validation
accuracy and cost, and test outputs are only measured. Two policies are compared on the same test images: the mean
difference of their correctness, averaged over seeds, with Student's t-interval over images, and Holm's correction.

Shapes: N test images, K exits, C classes, P operating points, B budgets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from exitkit.benchmarks.report.statistics import Difference, holm, paired_difference
from exitkit.errors import UserError, unknown
from exitkit.inference.calibration import exit_calibration
from exitkit.inference.combinations import COMBINATIONS, fit_combination
from exitkit.inference.operating_points import most_accurate_within
from exitkit.inference.rules import RULES, SCORED, fit_rule
from exitkit.inference.scores import SCORES
from exitkit.inference.thresholds import Floats, Integers, correct, realised

PLAIN = "plain"
"""Name of the outputs without a combination."""
FOLDS = 5
FRACTIONS = (0.25, 0.5, 0.75)
"""Default budgets: these fractions of the way from the first exit's cost to the last one's."""


UNKNOWN = Difference(np.nan, np.nan, np.nan, np.nan, 0)
"""The difference to the baseline where one of the two has no operating point within the budget."""


@dataclass(frozen=True)
class Policy:
    """A combination of exits, a score and a rule; `score` is empty for rules with their own features."""

    combination: str
    score: str
    rule: str

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.combination, self.score, self.rule)))


BASELINE = Policy(PLAIN, "confidence", "shares")


def policies(
    combinations: Sequence[str] = (), scores: Sequence[str] = (), rules: Sequence[str] = (), *, full: bool = False
) -> tuple[Policy, ...]:
    """Return policies, with the baseline first.

    Without names these are the policies that differ from the baseline in one part; with names, those of all given
    parts, and of the baseline's where none is given.

    Args:
        combinations, scores, rules: names.
        full: use all names of a part where none is given.

    Raises:
        UserError: a name is unknown.
    """
    given = (tuple(combinations), tuple(scores), tuple(rules))
    known = {"combination": (PLAIN, *COMBINATIONS), "score": SCORES, "rule": RULES}
    for (kind, names), chosen in zip(known.items(), given, strict=True):
        for name in chosen:
            if name not in names:
                raise unknown(kind, name, names)
    basis = (BASELINE.combination, BASELINE.score, BASELINE.rule)
    made: Iterable[tuple[str, ...]]
    if any(given) or full:
        otherwise = tuple(known.values()) if full else tuple((name,) for name in basis)
        made = product(*(chosen or names for chosen, names in zip(given, otherwise, strict=True)))
    else:
        made = ((*basis[:k], name, *basis[k + 1 :]) for k, names in enumerate(known.values()) for name in names)
    if rules and scores and not any(_reads(rule, score) for rule in rules for score in scores):
        raise UserError(f"{_text(rules)} can't use the score {_text(scores)}; rules with a score: {', '.join(SCORED)}")
    policies = (Policy(combination, score if rule in SCORED else "", rule) for combination, score, rule in made)
    return tuple(dict.fromkeys((BASELINE, *(policy for policy in policies if _reads(policy.rule, policy.score)))))


def _reads(rule: str, score: str) -> bool:
    """Whether a rule can be combined with a score; "" is the score of a rule with its own features."""
    if rule not in SCORED:
        return score in ("", BASELINE.score)
    return (rule, score) != ("stopping", "patience")


def _text(names: Sequence[str]) -> str:
    return " and ".join(names)


@dataclass(frozen=True)
class Outputs:
    """The stored outputs of a run: logits [., K, C] and labels of validation and test, and the exits' costs [K]."""

    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    costs: Floats


@dataclass(frozen=True)
class Measured:
    """A policy on one run."""

    policy: Policy
    cost: Floats
    """[P]: mean cost of the test images."""
    accuracy: Floats
    """[P], 0..1: accuracy on the test images."""
    validation_cost: Floats
    """[P]: cross-fitted."""
    validation_accuracy: Floats
    """[P]: cross-fitted."""
    hits: np.ndarray
    """[P, N]: whether each test image is right where it leaves."""
    leaves: np.ndarray
    """[P, N]: the exit (0-based) where it leaves."""
    falls: float
    """Share of steps from an exit to the next, over test images, at which the probability of the true class falls."""
    calibration: float
    """Expected calibration error on the test images, mean over the exits."""
    seconds: float
    """Time to fit combination and rule once."""


def measure(
    outputs: Outputs, chosen: Sequence[Policy], done: Callable[[float], None] = lambda _: None
) -> list[Measured]:
    """Fit and measure policies on the outputs of one run, in their order.

    Args:
        outputs: stored outputs.
        chosen: the policies.
        done: called with the finished share, 0..1.
    """
    labels = outputs.validation[1]
    if len(labels) < FOLDS:
        raise UserError(f"there are {len(labels)} validation images; expected at least {FOLDS}, one per fold")
    folds = np.random.default_rng(0).permutation(len(labels)) % FOLDS
    parts = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in range(FOLDS)]
    results: dict[Policy, Measured] = {}
    for combination in dict.fromkeys(policy.combination for policy in chosen):
        combined = _Combined(outputs, combination, parts)
        for policy in (policy for policy in chosen if policy.combination == combination):
            results[policy] = _measured(policy, combined, outputs.costs)
            done(len(results) / len(chosen))
    return [results[policy] for policy in chosen]


class _Combined:
    """Outputs of a combination, fitted on all validation samples and on each fold's others.

    Args:
        outputs: stored outputs.
        name: the combination.
        parts: positions of (the samples to fit on, the samples to measure) of each fold.
    """

    def __init__(self, outputs: Outputs, name: str, parts: Sequence[tuple[Integers, Integers]]) -> None:
        logits, labels = outputs.validation
        self.labels, self.test_labels = labels, outputs.test[1]
        begun = time.perf_counter()
        whole = _fitted(name, logits, labels, outputs.costs)
        self.seconds = time.perf_counter() - begun
        self.validation, self.test = whole(logits), whole(outputs.test[0])
        self.folds = []
        for fitting, measuring in parts:
            fold = _fitted(name, logits[fitting], labels[fitting], outputs.costs)
            self.folds.append((fold(logits[fitting]), labels[fitting], fold(logits[measuring]), measuring))
        self.correct, self.test_correct = correct(self.validation, labels), correct(self.test, self.test_labels)
        self.falls = _falls(self.test, self.test_labels)
        self.calibration = float(exit_calibration(self.test, self.test_labels).mean())


def _fitted(name: str, logits: np.ndarray, labels: np.ndarray, costs: Floats) -> Callable[[np.ndarray], np.ndarray]:
    return _unchanged if name == PLAIN else fit_combination(name, logits, labels, costs)


def _unchanged(logits: np.ndarray) -> np.ndarray:
    return logits


def _measured(policy: Policy, combined: _Combined, costs: Floats) -> Measured:
    score = policy.score or BASELINE.score
    begun = time.perf_counter()
    rule = fit_rule(policy.rule, combined.validation, combined.labels, costs, score=score)
    seconds = combined.seconds + time.perf_counter() - begun
    leaves = rule.leave_at(combined.test)
    point = realised(leaves, combined.test_correct, costs)
    unseen = np.empty((len(leaves), len(combined.labels)), dtype=np.int64)
    hits = np.empty(unseen.shape, dtype=bool)
    for fitting, labels, measured, places in combined.folds:
        at = fit_rule(policy.rule, fitting, labels, costs, score=score).leave_at(measured)
        unseen[:, places] = at
        hits[:, places] = correct(measured, combined.labels[places])[np.arange(len(places)), at]
    return Measured(
        policy,
        point.cost,
        point.accuracy,
        np.asarray(costs, dtype=np.float64)[unseen].mean(axis=1),
        hits.mean(axis=1),
        combined.test_correct[np.arange(leaves.shape[1]), leaves],
        leaves.astype(np.int16),
        combined.falls,
        combined.calibration,
        seconds,
    )


def _falls(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of steps from exit to exit, [N, K-1], at which the true class's probability falls."""
    # Imported on use: scipy takes a second to load.
    from scipy.special import softmax

    each = np.arange(len(labels))
    probabilities = np.stack(
        [softmax(logits.astype(np.float64), axis=1)[each, labels] for logits in outputs.swapaxes(0, 1)]
    )
    # Rounding of equal probabilities is no fall.
    return float((np.diff(probabilities, axis=0) < -1e-12).mean()) if len(probabilities) > 1 else 0.0


def default_budgets(costs: Floats) -> Floats:
    """Return the default budgets, [B], see `FRACTIONS`."""
    budgets: Floats = costs[0] + np.array(FRACTIONS) * (costs[-1] - costs[0])
    return budgets


def check_same_images(runs: Iterable[Outputs]) -> None:
    """Raise a UserError if runs that are averaged have different test images."""
    first, *others = runs
    if any(not np.array_equal(first.test[1], other.test[1]) for other in others):
        raise UserError("these runs have different test images; expected runs that differ in the seed only")


def comparison(seeds: Sequence[Sequence[Measured]], budgets: Floats) -> pd.DataFrame:
    """Compare policies with the baseline, which is the first, at each budget.

    Args:
        seeds: for each seed, the measured policies, in one order.
        budgets: mean costs, [B].

    Returns:
        a row per policy and budget: combination, score, rule, budget, cost and accuracy (%) on the test images,
        difference to the baseline in percentage points with its 95 % interval (low, high), p and p_holm, falls (%),
        calibration (%), seconds. Cost, accuracy and difference are NaN where no operating point is within the budget.
    """
    rows = []
    per_image = [list(_per_image(runs, budgets)) for runs in zip(*seeds, strict=True)]
    for runs, at_budgets in zip(zip(*seeds, strict=True), per_image, strict=True):
        policy = runs[0].policy
        for budget, (cost, hits), (_, baseline) in zip(budgets, at_budgets, per_image[0], strict=True):
            known = not (np.isnan(hits).any() or np.isnan(baseline).any())
            gain = paired_difference(100 * hits, 100 * baseline) if known else UNKNOWN
            rows.append(
                {
                    "combination": policy.combination,
                    "score": policy.score,
                    "rule": policy.rule,
                    "budget": budget,
                    "cost": cost,
                    "accuracy": 100 * hits.mean(),
                    "difference": gain.mean,
                    "low": gain.low,
                    "high": gain.high,
                    "p": np.nan if policy == BASELINE else gain.p,
                    "falls": 100 * np.mean([run.falls for run in runs]),
                    "calibration": 100 * np.mean([run.calibration for run in runs]),
                    "seconds": np.mean([run.seconds for run in runs]),
                }
            )
    frame = pd.DataFrame(rows)
    frame.insert(list(frame).index("p") + 1, "p_holm", holm(frame["p"]))
    return frame


def _per_image(runs: Sequence[Measured], budgets: Floats) -> Iterator[tuple[float, Floats]]:
    """Yield, for each budget, the mean test cost and each image's correctness [N], averaged over the seeds.

    Both are NaN where no operating point of a seed is within the budget on validation.
    """
    points = [most_accurate_within(run.validation_cost, run.validation_accuracy, budgets) for run in runs]
    for index, budget in enumerate(budgets):
        at = [(run, point[index]) for run, point in zip(runs, points, strict=True)]
        if any(run.validation_cost[point] > budget for run, point in at):
            yield np.nan, np.full(runs[0].hits.shape[1], np.nan)
        else:
            costs, hits = [run.cost[point] for run, point in at], [run.hits[point] for run, point in at]
            yield float(np.mean(costs)), np.mean(hits, axis=0)


def curves(seeds: Sequence[Sequence[Measured]]) -> pd.DataFrame:
    """Return all operating points, averaged over seeds.

    Returns:
        a row per policy and point: combination, score, rule, point, cost and accuracy (%) on the test images,
        validation_cost and validation_accuracy (%), the latter two cross-fitted.
    """
    frames = []
    for runs in zip(*seeds, strict=True):
        policy = runs[0].policy
        frames.append(
            pd.DataFrame(
                {
                    "combination": policy.combination,
                    "score": policy.score,
                    "rule": policy.rule,
                    "point": np.arange(1, len(runs[0].cost) + 1),
                    "cost": np.mean([run.cost for run in runs], axis=0),
                    "accuracy": 100 * np.mean([run.accuracy for run in runs], axis=0),
                    "validation_cost": np.mean([run.validation_cost for run in runs], axis=0),
                    "validation_accuracy": 100 * np.mean([run.validation_accuracy for run in runs], axis=0),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)
