"""Targets: what they mean, which point they choose, and how an unreachable one is refused."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from exitkit import ExitPolicy, ExitRule
from exitkit.errors import UserError
from exitkit.inference.calibration import fit_temperatures
from exitkit.inference.choose import _choose_policies, outcome_of_outputs
from exitkit.inference.rules.base import Validation
from exitkit.inference.scores import scores
from exitkit.inference.targets import Candidates, Target, choose_point

COSTS = np.array([10.0, 20.0, 40.0])


def candidates(points=12, samples=400, seed=0):
    """Points that use later exits more and more; later exits are right more often."""
    rng = np.random.default_rng(seed)
    hardness = rng.uniform(size=samples)
    right = np.stack([hardness < share for share in (0.6, 0.75, 0.9)], 1)
    limits = np.linspace(1, 0, points)[:, None]
    leaves = np.where(hardness < limits, 0, np.where(hardness < (1 + limits) / 2, 1, 2))
    hits = right[np.arange(samples), leaves]
    return Candidates(COSTS, leaves, hits, right[:, 2])


@pytest.mark.parametrize(
    ("given", "kind", "value", "unit"),
    [
        ({"budget": "40M"}, "budget", 40e6, "macs"),
        ({"budget": 25}, "budget", 25.0, "macs"),
        ({"budget": "60%"}, "budget", 0.6, "macs"),
        ({"budget": "1.5ms"}, "budget", 1.5, "latency"),
        ({"latency": "5ms"}, "budget", 5.0, "latency"),
        ({"latency_p95": 5}, "latency-p95", 5.0, "latency"),
        ({"lose": 1, "certainty": 0.95}, "lose", 1.0, "macs"),
        ({"accuracy": 75}, "accuracy", 75.0, "macs"),
    ],
)
def test_the_words_of_a_target(given, kind, value, unit):
    target = Target.of(**given)
    assert (target.kind, target.value, target.unit) == (kind, value, unit)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lose": 1, "certainty": 0.95}, "lose 1 certainty 0.95"),
        ({"budget": "60%", "at_most": True}, "budget 60% at-most"),
        ({"latency": "5ms"}, "latency 5ms"),
    ],
)
def test_a_target_is_told_with_its_certainty_or_bound(given, words):
    assert Target.of(**given).words == words


def test_no_words_are_no_target():
    assert Target.of() is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"budget": "40M", "lose": 1}, "budget and lose are given; expected one"),
        ({"certainty": 0.9}, "certainty is given without lose"),
        ({"lose": 1, "certainty": 95}, "certainty is 95; expected a probability"),
        ({"lose": -1}, "lose is -1; expected percentage points"),
        ({"lose": float("nan")}, "lose is nan"),
        ({"accuracy": 101}, "accuracy is 101"),
        ({"accuracy": 70, "at_most": True}, "at-most is given without a budget"),
        ({"budget": "0%"}, "budget is 0%; expected a share"),
        ({"budget": "abc%"}, "budget is abc%"),
        ({"budget": "120%"}, "up to 100%"),
        ({"latency": "60%"}, "latency is 60%; expected milliseconds"),
        ({"latency": "40M"}, "latency is 40M; expected milliseconds"),
        ({"budget": "much"}, "is not a cost"),
        ({"latency": "5s"}, "latency is 5s; expected milliseconds"),
        ({"latency_p95": "soonms"}, "latency-p95 'soonms' is not a cost"),
        ({"lose": "much"}, "lose is 'much'; expected a number"),
        ({"lose": True}, "lose is True; expected a number"),
        ({"accuracy": "75%"}, "accuracy is '75%'; expected a number"),
        ({"budget": [60]}, r"budget is \[60\]; expected a number"),
        ({"lose": 1, "certainty": "high"}, "certainty is 'high'; expected a number"),
        ({"budget": "60%", "at_most": "no"}, "at_most is 'no'; expected True or False"),
        ({"loose": 1}, "unknown target 'loose'; did you mean lose"),
    ],
)
def test_a_mistake_in_a_target_is_one_line(given, says):
    with pytest.raises(UserError, match=says):
        Target.of(**given)


def brute_force(points, within):
    """The most accurate point within a limit, by looking at each."""
    allowed = [p for p in range(len(points.leaves)) if within(p)]
    best = max(points.accuracy[p] for p in allowed)
    return {p for p in allowed if points.accuracy[p] == best}


@pytest.mark.parametrize("share", ["30%", "50%", "60%", "90%"])
def test_a_budget_chooses_the_most_accurate_point_within_it(share):
    points = candidates()
    bound = float(share[:-1]) / 100 * COSTS[-1]
    chosen = choose_point(Target.of(budget=share), points)
    spent = [np.mean(COSTS[leaves]) for leaves in points.leaves]
    assert chosen in brute_force(points, lambda p: spent[p] <= bound + 1e-9)


def test_at_most_bounds_the_upper_confidence_limit_of_the_cost():
    points = candidates()
    chosen = choose_point(Target.of(budget=25, at_most=True), points)
    limits = []
    for leaves in points.leaves:
        spent = COSTS[leaves]
        limits.append(spent.mean() + stats.t.ppf(0.95, len(spent) - 1) * stats.sem(spent))
    assert chosen in brute_force(points, lambda p: limits[p] <= 25)
    assert limits[chosen] <= 25
    assert choose_point(Target.of(budget=25), points) >= chosen


def test_a_bound_holds_on_new_images_as_often_as_it_says():
    """Of budgets that are bounds, at most 5 % are overspent by the mean cost of the population."""
    rng = np.random.default_rng(1)
    population = rng.uniform(size=100_000)
    overspent = 0
    for _ in range(200):
        drawn = rng.choice(population, 100)
        limits = np.linspace(0.99, 0.01, 60)[:, None]
        leaves = np.where(drawn < limits, 0, 2)
        points = Candidates(COSTS, leaves, leaves == 2, np.ones(100, dtype=bool))
        chosen = choose_point(Target.of(budget=25, at_most=True), points)
        overspent += np.where(population < limits[chosen], 10, 40).mean() > 25
    assert overspent <= stats.binom.ppf(0.999, 200, 0.05)


def test_latency_p95_bounds_the_time_of_all_but_a_twentieth_of_the_images():
    points = candidates()
    chosen = choose_point(Target.of(latency_p95="20ms"), points)
    slow = [np.mean(COSTS[leaves] > 20) for leaves in points.leaves]
    assert chosen in brute_force(points, lambda p: slow[p] <= 0.05 + 1 / 400)
    assert slow[chosen] <= 0.05 + 1 / 400


@pytest.mark.parametrize("lose", [0, 1, 5, 30])
def test_lose_chooses_the_lowest_cost_within_the_loss(lose):
    points = candidates()
    chosen = choose_point(Target.of(lose=lose), points)
    allowed = [p for p in range(12) if 100 * (points.full.mean() - points.accuracy[p]) <= lose + 1e-9]
    assert points.mean_cost[chosen] == min(points.mean_cost[p] for p in allowed)


def test_an_accuracy_chooses_the_lowest_cost_that_reaches_it():
    points = candidates()
    chosen = choose_point(Target.of(accuracy=75), points)
    allowed = [p for p in range(12) if points.accuracy[p] >= 0.75]
    assert points.mean_cost[chosen] == min(points.mean_cost[p] for p in allowed)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"budget": "10%"}, r"budget 10% is below the first exit's cost; expected at least 10 \(25%\)"),
        ({"budget": 9}, r"budget 9 is below the first exit's cost; expected at least 10 \(25%\)"),
        ({"accuracy": 99}, r"accuracy 99 is not reached .* the most accurate has \d"),
        ({"budget": 10, "at_most": True}, None),
        ({"lose": 1, "certainty": 0.999}, "can't be shown for any operating point with 400 images"),
    ],
)
def test_what_can_not_be_reached_is_refused_with_what_can(given, says):
    points = candidates()
    if says is None:  # all images leave at the first exit, whose cost does not vary
        assert choose_point(Target.of(**given), points) == 0
        return
    with pytest.raises(UserError, match=says):
        choose_point(Target.of(**given), points)


def outputs(samples, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, samples)
    signal = np.eye(4)[labels][:, None] * np.array([2.0, 3.0, 4.0])[:, None]
    return torch.tensor(rng.normal(size=(samples, 3, 4)) + signal), torch.tensor(labels)


def test_a_guarantee_needs_images_and_says_how_many():
    logits, labels = outputs(100)
    with pytest.raises(UserError, match=r"lose 1 with certainty 0\.95 can't be shown with 100") as error:
        ExitRule.from_outputs(logits, labels, COSTS, lose=1, certainty=0.95)
    needed = int(str(error.value).split("at least ")[1].split(" ")[0])
    logits, labels = outputs(needed - 1)
    with pytest.raises(UserError, match=f"at least {needed}"):
        ExitRule.from_outputs(logits, labels, COSTS, lose=1, certainty=0.95)


@pytest.mark.parametrize("policy", [None, "margin", "mean"])
def test_a_guarantee_holds_on_new_images(policy):
    """With certainty 0.8, at most a fifth of the choices lose more than promised (by the binomial distribution)."""
    broken, made = 0, 0
    new_logits, new_labels = outputs(20_000, seed=99)
    full = (new_logits[:, -1].argmax(1) == new_labels).double().mean()
    for seed in range(30):
        logits, labels = outputs(600, seed)
        wishes = {"lose": 4.0, "certainty": 0.8}
        try:
            if policy is None:
                chosen = ExitPolicy(ExitRule.from_outputs(logits, labels, COSTS, **wishes))
            else:
                chosen = ExitPolicy.from_outputs(policy, logits, labels, COSTS, **wishes)
        except UserError:
            continue
        made += 1
        accuracy = (chosen.on_outputs(new_logits)[0].argmax(1) == new_labels).double().mean()
        broken += full - accuracy > 0.04
    assert made >= 5
    assert broken <= stats.binom.ppf(0.999, made, 0.2)


def test_a_guarantee_has_temperatures_and_thresholds_of_other_images_than_it_is_tested_on():
    logits, labels = (part.numpy() for part in outputs(600))
    rule = ExitRule.from_outputs(logits, labels, COSTS, lose=4.0, certainty=0.8, calibrated=True)
    assert rule.temperatures == tuple(fit_temperatures(logits[::2], labels[::2]))
    even = scores(logits[::2], "confidence", rule.temperatures)
    assert all(limit in even[:, exit] for exit, limit in enumerate(rule.thresholds[:-1]) if np.isfinite(limit))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"share": -1}, "share is -1; expected the ratio"),
        ({"share": "1"}, "share is '1'; expected the ratio"),
        ({"share": float("nan")}, "share is nan; expected the ratio"),
        ({"score": None}, "unknown exit rule None; available: confidence"),
        ({"calibrated": "no"}, "calibrated is 'no'; expected True or False"),
        ({"calibrated": True, "score": "patience"}, "calibrated has no effect on the score patience"),
    ],
)
def test_a_mistake_in_the_choice_of_a_rule_is_one_line(given, says):
    with pytest.raises(UserError, match=says):
        ExitRule.from_outputs(*outputs(50), COSTS, **given)


@pytest.mark.parametrize("policy", [None, 3])
def test_a_policy_without_a_name_is_one_line(policy):
    with pytest.raises(UserError, match=r"policy is (None|3); expected a name, such as mie\+stopping"):
        ExitPolicy.from_outputs(policy, *outputs(50), COSTS)


def test_a_budget_of_the_first_exits_share_is_met_although_it_is_rounded():
    for first in (29, 57, 58):
        logits, labels = outputs(50)
        rule = ExitRule.from_outputs(logits, labels, (float(first), 60.0, 100.0), budget=f"{first}%")
        assert ExitPolicy(rule).on_outputs(logits)[1].eq(0).all()


def test_of_equally_accurate_points_a_bound_chooses_the_lowest_cost():
    leaves = np.tile([[0], [1], [2]], 100)
    points = Candidates(COSTS, leaves, leaves > 0, np.ones(100, dtype=bool))
    for bound in ({"latency_p95": "90ms"}, {"budget": 90, "at_most": True}):
        assert choose_point(Target.of(**bound), points) == 1


def test_what_a_fitted_policy_promises_is_not_measured_on_the_images_of_its_fit():
    inside, promised = [], []
    for seed in range(4):
        logits = torch.randn(300, 3, 10, generator=torch.Generator().manual_seed(seed))
        labels = torch.randint(10, (300,), generator=torch.Generator().manual_seed(seed + 9))
        logits[torch.arange(300), :, labels] += 1
        validation = Validation.checked(logits.numpy(), labels.numpy(), COSTS)
        (chosen,) = _choose_policies("geometric+stopping", validation, [Target.of(budget=25)])
        inside.append(outcome_of_outputs(chosen.policy, logits, labels, COSTS)["accuracy"])
        promised.append(chosen.validation["accuracy"])
    assert np.mean(promised) < np.mean(inside) - 1


def test_a_share_is_any_number():
    rules = [ExitRule.from_outputs(*outputs(50), COSTS, share=share) for share in (1, np.int64(1), Fraction(1))]
    assert rules[0] == rules[1] == rules[2]


def test_a_guarantee_beside_a_budget_does_not_change_the_budget():
    logits, labels = outputs(600)
    validation = Validation.checked(logits.numpy(), labels.numpy(), COSTS)
    certain, budget = Target.of(lose=4, certainty=0.8), Target.of(budget="60%")
    both = _choose_policies("mean", validation, [certain, budget])
    apart = [_choose_policies("mean", validation, [target])[0] for target in (certain, budget)]
    assert [each.policy.to_json() for each in both] == [each.policy.to_json() for each in apart]
    assert both == apart


def test_a_share_of_the_cost_is_the_same_budget_as_its_number():
    logits, labels = outputs(300)
    assert ExitRule.from_outputs(logits, labels, COSTS, budget="60%") == ExitRule.from_outputs(
        logits, labels, COSTS, budget=24.0
    )


def test_every_target_gives_a_rule_that_reaches_it_on_validation():
    logits, labels = outputs(500)
    full = (logits[:, -1].argmax(1) == labels).double().mean().item()
    for lose, score in itertools.product((0.5, 2.0), ("confidence", "margin", "entropy", "patience")):
        rule = ExitPolicy(ExitRule.from_outputs(logits, labels, COSTS, lose=lose, score=score))
        predicted, _ = rule.on_outputs(logits)
        assert (predicted.argmax(1) == labels).double().mean().item() >= full - lose / 100 - 1e-9
