"""Exit policies compared on stored outputs, without training.

A policy is a combination of exits, a score and a rule. The baseline is plain confidence with the shares of the papers.
Everything is fitted on validation outputs; the operating point of a budget is selected by cross-fitted validation
accuracy and cost, and test outputs are only measured. Two policies are compared on the same test images: the mean
difference of their correctness, averaged over seeds, with Student's t-interval over images, and Holm's correction.

At each budget one policy is preferred, on validation alone: the baseline, unless the cross-fitted gain of another one
with the label-free rule `shares` exceeds its standard error (paired by image); and that one, unless the gain of a
policy with another rule over it does.

Shapes: N test images, M validation images, K exits, C classes, P operating points, B budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd

from exitkit.benchmarks.report.statistics import Difference, holm, paired_difference
from exitkit.errors import UserError, unknown
from exitkit.inference.calibration import exit_calibration
from exitkit.inference.choose import EmbeddedRun, stored_embeddings
from exitkit.inference.combinations import COMBINATIONS
from exitkit.inference.operating_points import most_accurate_within
from exitkit.inference.outputs import Embeddings, ExitOutputs
from exitkit.inference.policy import (
    BASELINE,
    KNOWN,
    PLAIN,
    CrossFitted,
    FittedPolicy,
    PolicyName,
    cross_fit,
    read_policy,
)
from exitkit.inference.rules import RULES, SCORED, reads
from exitkit.inference.rules.base import Validation
from exitkit.inference.scores import SCORES
from exitkit.inference.thresholds import Floats, realised

FRACTIONS = (0.25, 0.5, 0.75)
"""Default budgets: these fractions of the way from the first exit's cost to the last one's."""


UNKNOWN = Difference(np.nan, np.nan, np.nan, np.nan, 0)
"""The difference to the baseline where one of the two has no operating point within the budget."""


def policies(
    combinations: Sequence[str] = (),
    scores: Sequence[str] = (),
    rules: Sequence[str] = (),
    *,
    names: Sequence[str] = (),
    full: bool = False,
    embeddings: bool = False,
) -> tuple[PolicyName, ...]:
    """Return policies, with the baseline first.

    Without names these are the policies that differ from the baseline in one part; with names, those of all given
    parts, and of the baseline's where none is given.

    Args:
        combinations, scores, rules: names of parts.
        names: texts of whole policies (see `read_policy`), which come first; `all`: those without names.
        full: use all names of a part where none is given.
        embeddings: whether the runs have stored embeddings; without them, only given names are of policies that read
            them.

    Raises:
        UserError: a name is unknown, a given rule reads none of the given scores, or a given score is read by no given
            rule.
    """
    given = (tuple(combinations), tuple(scores), tuple(rules))
    for (kind, all_names), chosen in zip(_KNOWN.items(), given, strict=True):
        for name in chosen:
            if name not in all_names:
                raise unknown(kind, name, all_names)
    known = _KNOWN if embeddings else _KNOWN | {"combination": (PLAIN, *COMBINATIONS)}
    if rules and scores:
        pairs: list[tuple[Sequence[str], Sequence[str]]] = [((rule,), scores) for rule in rules]
        pairs += [(rules, (score,)) for score in scores]
        for some, read in pairs:
            if not any(_compatible(rule, score) for rule, score in product(some, read)):
                both = f"{' and '.join(some)} can't use the score {' or '.join(read)}"
                raise UserError(f"{both}; rules with a score: {', '.join(SCORED)}")
    made: Iterable[tuple[str, ...]] = ()
    if any(given) or full:
        otherwise = tuple(known.values()) if full else tuple((name,) for name in _PARTS)
        made = product(*(chosen or all_names for chosen, all_names in zip(given, otherwise, strict=True)))
    elif not names:
        made = ((*_PARTS[:k], name, *_PARTS[k + 1 :]) for k, part in enumerate(known.values()) for name in part)
    fitting = (PolicyName(combination, score, rule) for combination, score, rule in made if _compatible(rule, score))
    every = policies(embeddings=embeddings) if "all" in names else ()
    whole = (policy for name in names for policy in (every if name == "all" else [read_policy(name)]))
    return tuple(dict.fromkeys((BASELINE, *whole, *fitting)))


_KNOWN: dict[str, tuple[str, ...]] = {"combination": KNOWN, "score": SCORES, "rule": RULES}
_PARTS = (BASELINE.combination, BASELINE.score, BASELINE.rule)


def _compatible(rule: str, score: str) -> bool:
    return reads(rule, score) if rule in SCORED else score == BASELINE.score


@dataclass(frozen=True)
class Outputs:
    """The stored outputs of a run: logits [., K, C] and labels of validation and test, and the exits' costs [K].

    With the embeddings of validation and test, for policies that read them.
    """

    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    costs: Floats
    embeddings: tuple[Embeddings, Embeddings] | tuple[None, None] = (None, None)

    @classmethod
    def of_run(cls, run: EmbeddedRun, costs: Floats, chosen: Sequence[PolicyName]) -> Outputs:
        """Return the outputs of a run, with the embeddings if one of the policies reads them.

        Raises:
            UserError: they are not stored; the message names the command that stores them.
        """
        validation, test = ((part["logits"], part["labels"]) for part in map(run.outputs, ("validation", "test")))
        if not any(policy.reads_embeddings for policy in chosen):
            return cls(validation, test, costs)
        embedded = (stored_embeddings(run, "validation"), stored_embeddings(run, "test"))
        return cls(validation, test, costs, embedded)


@dataclass(frozen=True)
class Measured:
    """A policy on one run."""

    policy: PolicyName
    cost: Floats
    """[P]: mean cost of the test images."""
    accuracy: Floats
    """[P], 0..1: accuracy on the test images."""
    hits: np.ndarray
    """[P, N]: whether each test image is right where it leaves."""
    leaves: np.ndarray
    """[P, N]: the exit (0-based) where it leaves."""
    validation_cost: Floats
    """[P]: cross-fitted."""
    validation_hits: np.ndarray
    """[P, M]: whether each validation image is right where it leaves, cross-fitted."""
    falls: float
    """Share of steps from an exit to the next, over test images, at which the probability of the true class falls."""
    calibration: float
    """Expected calibration error on the test images, mean over the exits."""
    seconds: float
    """Time to fit combination and rule once."""

    @property
    def validation_accuracy(self) -> Floats:
        """[P], 0..1: cross-fitted."""
        accuracy: Floats = self.validation_hits.mean(axis=1)
        return accuracy


class _Combined(NamedTuple):
    """Test outputs of a combination, and what does not depend on the rest of a policy."""

    outputs: ExitOutputs
    correct: np.ndarray
    falls: float
    calibration: float

    @classmethod
    def make(cls, fitted: FittedPolicy, outputs: Outputs) -> _Combined:
        combined, labels = fitted.outputs(ExitOutputs(outputs.test[0], outputs.embeddings[1])), outputs.test[1]
        ece = float(exit_calibration(combined.logits, labels).mean())
        return cls(combined, combined.correct(labels), _falls(combined.logits, labels), ece)


def measure(
    outputs: Outputs, chosen: Sequence[PolicyName], done: Callable[[float], None] = lambda _: None
) -> list[Measured]:
    """Fit and measure policies on the outputs of one run, in their order.

    Args:
        outputs: stored outputs.
        chosen: the policies.
        done: called with the finished share, 0..1.
    """
    validation = Validation.checked(*outputs.validation, outputs.costs, outputs.embeddings[0])
    results: dict[PolicyName, Measured] = {}
    name, combined = "", None
    for fitted in cross_fit(chosen, validation, done):
        policy = fitted.policy
        if combined is None or policy.name.combination != name:  # those of one combination follow each other
            name, combined = policy.name.combination, _Combined.make(policy, outputs)
        results[policy.name] = _measured(fitted, combined, validation.costs)
    return [results[policy] for policy in chosen]


def _measured(fitted: CrossFitted, combined: _Combined, costs: Floats) -> Measured:
    leaves = fitted.policy.rule.leave_at(combined.outputs)
    point = realised(leaves, combined.correct, costs)
    return Measured(
        policy=fitted.policy.name,
        cost=point.cost,
        accuracy=point.accuracy,
        hits=combined.correct[np.arange(leaves.shape[1]), leaves],
        leaves=leaves.astype(np.int16),
        validation_cost=costs[fitted.leaves].mean(axis=1),
        validation_hits=fitted.hits,
        falls=combined.falls,
        calibration=combined.calibration,
        seconds=fitted.seconds,
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
    """Raise a UserError if runs that are averaged have different validation or test images."""
    first, *others = runs
    for part in ("validation", "test"):
        if any(not np.array_equal(getattr(first, part)[1], getattr(other, part)[1]) for other in others):
            raise UserError(f"these runs have different {part} images; expected runs that differ in the seed only")


def comparison(seeds: Sequence[Sequence[Measured]], budgets: Floats) -> pd.DataFrame:
    """Compare policies with the baseline, which is the first, at each budget.

    Args:
        seeds: for each seed, the measured policies, in one order.
        budgets: mean costs, [B].

    Returns:
        a row per policy and budget: combination, score, rule, budget, cost and accuracy (%) on the test images,
        difference to the baseline in percentage points with its 95 % interval (low, high), p and p_holm, gain (the
        cross-fitted difference on validation) with its standard error gain_error, preferred (see above), falls (%),
        calibration (%), seconds. Cost, accuracy and differences are NaN where no operating point is within the budget.
    """
    rows = []
    everyone = list(zip(*seeds, strict=True))
    at_budgets = [list(_at_budgets(runs, budgets)) for runs in everyone]
    preferred = [_preferred([policy[index] for policy in at_budgets], everyone) for index in range(len(budgets))]
    for number, (runs, at) in enumerate(zip(everyone, at_budgets, strict=True)):
        policy = runs[0].policy
        for index, (budget, here, baseline) in enumerate(zip(budgets, at, at_budgets[0], strict=True)):
            known = not (np.isnan(here.cost) or np.isnan(baseline.cost))
            difference = paired_difference(100 * here.hits, 100 * baseline.hits) if known else UNKNOWN
            gain, error = _gain(here, baseline)
            rows.append(
                {
                    "combination": policy.combination,
                    "score": policy.score,
                    "rule": policy.rule_text,
                    "budget": budget,
                    "cost": here.cost,
                    "accuracy": 100 * here.hits.mean(),
                    "difference": difference.mean,
                    "low": difference.low,
                    "high": difference.high,
                    "p": np.nan if policy == BASELINE else difference.p,
                    "gain": 100 * gain,
                    "gain_error": 100 * error,
                    "preferred": number == preferred[index],
                    "falls": 100 * np.mean([run.falls for run in runs]),
                    "calibration": 100 * np.mean([run.calibration for run in runs]),
                    "seconds": np.mean([run.seconds for run in runs]),
                }
            )
    frame = pd.DataFrame(rows)
    frame.insert(list(frame).index("p") + 1, "p_holm", holm(frame["p"]))
    return frame


class _AtBudget(NamedTuple):
    """A policy at one budget, averaged over seeds; all is NaN where a seed has no operating point within it."""

    cost: float
    """On the test images."""
    hits: Floats
    """[N]: correctness of each test image, 0..1."""
    validation_hits: Floats
    """[M]: correctness of each validation image, cross-fitted, 0..1."""


def _at_budgets(runs: Sequence[Measured], budgets: Floats) -> Iterator[_AtBudget]:
    points = [most_accurate_within(run.validation_cost, run.validation_accuracy, budgets) for run in runs]
    for index, budget in enumerate(budgets):
        at = [(run, point[index]) for run, point in zip(runs, points, strict=True)]
        if any(run.validation_cost[point] > budget for run, point in at):
            blank = (np.full(part.shape[1], np.nan) for part in (runs[0].hits, runs[0].validation_hits))
            yield _AtBudget(np.nan, *blank)
        else:
            yield _AtBudget(
                float(np.mean([run.cost[point] for run, point in at])),
                np.mean([run.hits[point] for run, point in at], axis=0),
                np.mean([run.validation_hits[point] for run, point in at], axis=0),
            )


def _gain(here: _AtBudget, reference: _AtBudget) -> tuple[float, float]:
    """Return the mean difference of the validation correctness, paired by image, and its standard error."""
    change = here.validation_hits - reference.validation_hits
    return float(change.mean()), float(change.std(ddof=1)) / len(change) ** 0.5


def _preferred(at: Sequence[_AtBudget], everyone: Sequence[Sequence[Measured]]) -> int:
    """Return the number of the policy that is preferred at a budget, from each policy there; the first is the baseline.

    The baseline is also preferred where it has no operating point: nothing can then be compared with it.
    """
    chosen = 0
    for label_free in (True, False):
        better = []
        for number, runs in enumerate(everyone):
            gain, error = _gain(at[number], at[chosen])
            if (runs[0].policy.rule == BASELINE.rule) == label_free and gain > error:
                better.append((gain, -number))
        chosen = -max(better)[1] if better else chosen
    return chosen


def run_tables(outputs: Outputs, chosen: Sequence[PolicyName], budgets: Floats) -> dict[str, pd.DataFrame]:
    """Return the rows of one run for a report: its operating points at the budgets, and all of them.

    Returns:
        policies: policy, budget, cost and accuracy (%) on the test images, NaN where no operating point is within the
        budget. policy_curve: policy, point, cost and accuracy (%).
    """
    rows, points = [], []
    for run in measure(outputs, chosen):
        name = str(run.policy)
        for budget, here in zip(budgets, _at_budgets([run], budgets), strict=True):
            rows.append({"policy": name, "budget": budget, "cost": here.cost, "accuracy": 100 * here.hits.mean()})
        numbers = range(1, len(run.cost) + 1)
        points.append(
            pd.DataFrame({"policy": name, "point": numbers, "cost": run.cost, "accuracy": 100 * run.accuracy})
        )
    return {"policies": pd.DataFrame(rows), "policy_curve": pd.concat(points, ignore_index=True)}


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
                    "rule": policy.rule_text,
                    "point": np.arange(1, len(runs[0].cost) + 1),
                    "cost": np.mean([run.cost for run in runs], axis=0),
                    "accuracy": 100 * np.mean([run.accuracy for run in runs], axis=0),
                    "validation_cost": np.mean([run.validation_cost for run in runs], axis=0),
                    "validation_accuracy": 100 * np.mean([run.validation_accuracy for run in runs], axis=0),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)
