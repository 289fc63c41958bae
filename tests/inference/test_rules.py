from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from exitkit.errors import UserError
from exitkit.inference.adaptive import AdaptiveInference
from exitkit.inference.outputs import ExitOutputs, ExitView
from exitkit.inference.rules import RULES, SCORED, agreement, eenet, fit_rule, fitted, jei, rule_from_json, stopping
from exitkit.inference.rules.base import Validation
from exitkit.inference.rules.reward import isotonic, prices
from exitkit.inference.scores import patience_thresholds, scores
from exitkit.inference.thresholds import (
    PAPER_SHARES,
    budgeted,
    correct,
    exit_counts,
    leave_at,
    planned_cost,
    realised,
    thresholds,
)
from exitkit.networks.build import build_network

COSTS = np.array([10.0, 25.0, 45.0, 80.0])


def outputs(seed, samples=600, exits=4, classes=5, excluded=False):
    """Outputs of samples of varying difficulty, on which later exits are more accurate."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    ease = np.linspace(0.7, 2.5, exits)[:, None] + 1.2 * rng.normal(size=(samples, 1, 1))
    noise = 0.6 * rng.normal(size=(samples, 1, classes)) + 0.7 * rng.normal(size=(samples, exits, classes))
    logits = 1.5 * (noise + ease * np.eye(classes)[labels][:, None])
    if excluded:
        hidden = rng.random(logits.shape) < 0.2
        hidden[np.arange(samples), :, logits.max(axis=1).argmax(axis=1)] = False
        logits[hidden] = -np.inf
    return logits, labels


@pytest.fixture(scope="module", params=RULES)
def rule(request):
    return fit_rule(request.param, *outputs(0), COSTS)


def deployed(rule, logits):
    """Where samples leave if each exit is handed only those that have not left, with their memory."""
    left = np.empty(len(logits), dtype=np.int64)
    rows, memory = torch.arange(len(logits)), None
    for k in range(logits.shape[1]):
        leaves, memory = rule.leaving(k, torch.from_numpy(logits[:, k])[rows], memory)
        left[rows[leaves].numpy()] = k
        rows = rows[~leaves]
        memory = pytree.tree_map_only(torch.Tensor, lambda part, stays=~leaves: part[stays], memory)
    assert not len(rows)
    return left


# Properties of every rule


@pytest.mark.parametrize("excluded", [False, True])
def test_deployed_decisions_equal_leave_at_and_survive_json(rule, excluded):
    logits, _ = outputs(1, samples=150, excluded=excluded)
    expected = rule.leave_at(logits)
    assert expected.shape == (rule.points, 150) and expected.dtype == np.int64
    for point in range(0, rule.points, 3):
        one = rule.at(point)
        np.testing.assert_array_equal(deployed(one, logits), expected[point])
        again = rule_from_json(one.to_json())
        assert again.to_json() == one.to_json()
        np.testing.assert_array_equal(deployed(again, logits), expected[point])


def test_a_sample_is_decided_without_the_others_and_before_later_exits(rule):
    logits, _ = outputs(2, samples=40)
    expected = rule.leave_at(logits)
    np.testing.assert_array_equal(np.concatenate([rule.leave_at(row[None]) for row in logits], axis=1), expected)
    for k in range(3):
        changed = logits.copy()
        changed[:, k + 1 :] = outputs(3, samples=40)[0][:, k + 1 :]
        np.testing.assert_array_equal(np.minimum(rule.leave_at(changed), k + 1), np.minimum(expected, k + 1))


def test_points_ascend_in_cost_and_spread(rule):
    logits, labels = outputs(0)
    cost = realised(rule.leave_at(logits), correct(logits, labels), COSTS).cost
    # Points of learned rules are in order of their plan, which they follow up to the error of the fit.
    assert np.corrcoef(np.arange(rule.points), cost)[0, 1] > 0.8
    assert cost[-1] - cost[0] > 12


def test_points_that_do_not_exist_and_wrong_logits_are_refused(rule):
    with pytest.raises(UserError, match=f"expected 0..{rule.points - 1}"):
        rule.at(rule.points)
    with pytest.raises(UserError, match=r"expected \[N, 4, C\]"):
        rule.leave_at(np.zeros((3, 5, 5)))
    for k in range(4):
        logits = np.zeros((3, 4, 5))
        logits[1, k, 0] = np.nan
        with pytest.raises(UserError, match=f"exit {k + 1} are not finite"):
            rule.leave_at(logits)


@pytest.mark.parametrize("name", RULES)
def test_one_exit_and_one_sample(name):
    logits, labels = outputs(4, samples=1, exits=1)
    rule = fit_rule(name, logits, labels, [3.0])
    assert not rule.leave_at(outputs(5, samples=9, exits=1)[0]).any()
    again = rule_from_json(rule.at(0).to_json())
    assert again.leaving(0, torch.zeros(2, 5))[0].tolist() == [True, True]
    two = fit_rule(name, *outputs(4, samples=1, exits=2), [3.0, 3.0])
    assert two.leave_at(outputs(5, samples=9, exits=2)[0]).max() <= 1


@pytest.mark.parametrize("name", RULES)
def test_a_fit_is_deterministic_and_leaves_torch_as_it_was(name):
    data = outputs(6, samples=120)
    state = torch.random.get_rng_state()
    first, second = (fit_rule(name, *data, COSTS, seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.at(1).to_json() == second.at(1).to_json()


@pytest.mark.parametrize("name", RULES)
def test_the_unit_of_cost_does_not_matter(name):
    (logits, labels), (test, _) = outputs(7), outputs(8)
    plain, large = (fit_rule(name, logits, labels, COSTS * 2.0**power).leave_at(test) for power in (0, 20))
    np.testing.assert_array_equal(plain, large)


def test_impossible_input_is_refused():
    logits, labels = outputs(0, samples=20)
    with pytest.raises(UserError, match="did you mean stopping"):
        fit_rule("stoping", logits, labels, COSTS)
    for name in set(RULES) - set(SCORED):
        with pytest.raises(UserError, match=f"{name} does not read the score margin"):
            fit_rule(name, logits, labels, COSTS, score="margin")
    with pytest.raises(UserError, match="expected the score confidence, margin or entropy"):
        fit_rule("stopping", logits, labels, COSTS, score="patience")
    with pytest.raises(UserError, match="unknown exit rule"):
        fit_rule("fitted", logits, labels, COSTS, score="certainty")
    with pytest.raises(UserError, match=r"expected \[N, K, C\]"):
        fit_rule("shares", logits, labels[1:], COSTS)
    with pytest.raises(UserError, match=r"expected classes 0\.\.4"):
        fit_rule("shares", logits, labels + 1, COSTS)
    with pytest.raises(UserError, match="expected 4, one per exit"):
        fit_rule("shares", logits, labels, COSTS[1:])
    with pytest.raises(UserError, match="do not decrease"):
        fit_rule("shares", logits, labels, COSTS[::-1])
    with pytest.raises(UserError, match="40 operating points"):
        fit_rule("agreement", logits, labels, COSTS).leaving(0, torch.zeros(1, 5))
    with pytest.raises(UserError, match="unknown weights"):
        agreement.fit(fit_validation(logits, labels), weights="costs")


def fit_validation(logits, labels, costs=COSTS):
    return Validation.checked(logits, labels, costs)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "3", "{}", "[" * 9999),
        *('{"rule": "jei"}', '{"rule": {"name": "jie"}}', '{"rule": {"name": "jei", "gates": 0}}'),
    ],
)
def test_text_that_is_not_a_rule_is_refused(text):
    with pytest.raises(UserError, match=r"not a rule|not an exit rule|unknown rule|operating points"):
        rule_from_json(text)


def test_half_precision_is_decided_as_float32():
    rule = fit_rule("stopping", *outputs(0), COSTS).at(25)
    logits = torch.from_numpy(outputs(1, samples=50)[0][:, 0]).bfloat16()
    leaves, _ = rule.leaving(0, logits)
    assert torch.equal(leaves, rule.leaving(0, logits.float())[0]) and 0 < leaves.sum() < 50


# shares


@pytest.mark.parametrize("score", ["confidence", "margin", "entropy"])
def test_shares_reproduce_budgeted(score):
    (logits, labels), (test, test_labels) = outputs(0), outputs(1, samples=333)
    rule = fit_rule("shares", logits, labels, COSTS, score=score)
    counts, hits = exit_counts(600, 4, (*PAPER_SHARES, math.inf)), correct(test, test_labels)
    expected = budgeted(scores(logits, score), scores(test, score), hits, COSTS, counts)
    found = realised(rule.leave_at(test), hits, COSTS)
    for part in ("accuracy", "cost", "rates"):
        np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))
    np.testing.assert_array_equal([rule.at(point).thresholds for point in range(40)], expected.thresholds)
    assert (rule.leave_at(test)[-1] == 3).all()


def test_shares_do_not_read_labels():
    logits, labels = outputs(0)
    first, second = (fit_rule("shares", logits, each, COSTS).leave_at(logits) for each in (labels, labels[::-1]))
    np.testing.assert_array_equal(first, second)


# agreement


def test_agreement_of_certain_exits_is_patience():
    predicted = np.random.default_rng(0).integers(0, 3, (2000, 6))
    certain = np.where(np.eye(3)[predicted] > 0, 0.0, -np.inf)
    found = agreement.agreement_scores(certain, np.ones(6))
    np.testing.assert_array_equal(found, scores(certain, "patience"))
    assert found.max() == 6


def test_agreement_matches_a_loop_and_starts_anew_when_exits_disagree():
    logits, weights = outputs(0, samples=80)[0], np.array([0.1, 0.3, 0.6, 1.0])
    confidence, predicted = scores(logits, "confidence"), logits.argmax(axis=2)
    expected = np.empty((80, 4))
    for i, k in itertools.product(range(80), range(4)):
        agrees = k > 0 and predicted[i, k] == predicted[i, k - 1]
        expected[i, k] = weights[k] * confidence[i, k] + (expected[i, k - 1] if agrees else 0)
    np.testing.assert_allclose(agreement.agreement_scores(logits, weights), expected, rtol=1e-14)
    apart = np.where(np.eye(5)[np.arange(4)] > 0, logits.max() + 1, logits)
    np.testing.assert_array_equal(agreement.agreement_scores(apart, weights), weights * scores(apart, "confidence"))


def test_weights_of_agreement():
    logits, labels = outputs(0)
    data = fit_validation(logits, labels)
    np.testing.assert_array_equal(agreement.fit(data).weights, COSTS / 80)
    np.testing.assert_array_equal(agreement.fit(data, weights="linear").weights, [1, 2, 3, 4])
    np.testing.assert_array_equal(agreement.fit(data, weights="accuracy").weights, correct(logits, labels).mean(axis=0))


# stopping and fitted


def test_prices_and_isotonic_regression():
    hits = np.array([[0, 1], [0, 1], [1, 1], [0, 1]], dtype=bool)
    found = prices(hits, [2.0, 5.0], points=3)
    np.testing.assert_allclose(found, 0.25 * np.array([30, 1, 1 / 30]), rtol=1e-12)
    assert (prices(hits[:, ::-1], [2.0, 5.0]) > 0).all() and np.isfinite(prices(hits, [4.0, 4.0])).all()
    # Pool adjacent violators by hand: 1 0 at scores 2 and 3 become 1/2 each.
    knots, values = isotonic([1, 2, 3, 4], [0, 1, 0, 1])
    np.testing.assert_allclose(np.interp([0, 1, 2, 3, 4, 9], knots, values), [0, 0, 0.5, 0.5, 1, 1])


def test_regression_is_ridge_on_standardised_columns():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 3)) * [1, 10, 0.1] + [5, 0, -2], rng.normal(size=(50, 2))
    found = stopping.regression(list(x.T), y, ridge=2.0)
    scale = x.std(axis=0)

    def penalised(beta, column):
        return ((y[:, column] - beta[0] - x @ beta[1:]) ** 2).sum() + 2.0 * ((beta[1:] * scale) ** 2).sum()

    for column in range(2):
        least = penalised(found[column], column)
        for place, step in itertools.product(range(4), (-1e-4, 1e-4)):
            moved = found[column].copy()
            moved[place] += step
            assert penalised(moved, column) > least
    constant = stopping.regression([np.full(50, 3.0), x[:, 0]], y)
    np.testing.assert_array_equal(constant[:, 1], 0)


def test_stopping_with_a_constant_only_is_one_threshold_on_the_probability_per_exit():
    right = np.random.default_rng(0).random((100, 3))
    costs, price = np.array([1.0, 2.0, 4.0]), np.array([0.05, 0.2])
    found = stopping.backward([[], []], right, costs, price)
    for point, each in enumerate(price):
        value = right[:, 2] - each * 4
        for k in (1, 0):
            mean = value.mean()
            assert found[point, k] == pytest.approx(mean, rel=1e-12)
            reward = right[:, k] - each * costs[k]
            value = np.where(right[:, k] >= mean + each * costs[k], reward, value)


def test_extreme_prices_of_stopping():
    logits, labels = outputs(0)
    rule = fit_rule("stopping", logits, labels, COSTS)
    values = scores(logits, "confidence")
    right = np.stack([np.interp(values[:, k], rule.knots[k], rule.values[k]) for k in range(4)], axis=1)
    columns, memory = [], None
    for k, g in enumerate(stopping.score_logit(values).T[:-1]):
        part, memory = stopping._columns(k, g, memory)
        columns.append(part)
    ends = np.array([1e6, 0.0])
    ends = replace(rule, prices=ends, coefficients=stopping.backward(columns, right, COSTS, ends))
    left = ends.leave_at(logits)
    assert not left[0].any()
    # Without a price, a sample leaves exactly where its probability reaches the expected one.
    for k in range(3):
        design = np.column_stack([np.ones(600), *columns[k]])
        stops = right[:, k] >= design @ ends.coefficients[1, k]
        assert not stops[left[1] > k].any() and stops[left[1] == k].all()
    # The fit itself is that of the same columns.
    np.testing.assert_array_equal(rule.coefficients, stopping.backward(columns, right, COSTS, rule.prices))


def test_columns_of_the_regression():
    g, memory = np.random.default_rng(0).normal(size=(9, 4)), None
    for k in range(4):
        columns, memory = stopping._columns(k, g[:, k], memory)
        before = g[:, k - 1] if k else np.zeros(9)
        expected = [g[:, k], g[:, k] ** 2, before, g[:, : k + 1].mean(axis=1)]
        np.testing.assert_allclose(columns, expected, atol=1e-14)


def test_score_logits_are_limited():
    found = stopping.score_logit([0.0, 0.5, 1.0, 0.731058578630005])
    np.testing.assert_allclose(found, [-12, 0, 12, 1.0], atol=1e-12)


@pytest.mark.parametrize("name", ["stopping", "fitted"])
def test_cost_falls_with_the_price_on_the_samples_of_the_fit(name):
    logits, labels = outputs(0, samples=3000)
    rule = fit_rule(name, logits, labels, COSTS)
    cost = realised(rule.leave_at(logits), correct(logits, labels), COSTS).cost
    assert (np.diff(cost) >= -0.02 * COSTS[-1]).all() and (np.diff(cost) > 0).sum() > 10


def test_stopping_finds_what_earlier_exits_know():
    """Exit 2 repeats an uninformative score; only exit 1's tells whether going on to exit 3 pays."""
    rng = np.random.default_rng(0)

    def draw(samples):
        hard = rng.random(samples) < 0.5
        labels = rng.integers(0, 2, samples)
        sign = 1 - 2 * labels
        logits = np.zeros((samples, 3, 2))
        right = np.where(hard, rng.random(samples) < 0.5, True)
        logits[:, 0, 0] = np.where(right, 1, -1) * sign * np.where(hard, 0.1, 0.3)
        logits[:, 1, 0] = np.where(right, 1, -1) * sign * 0.2
        logits[:, 2, 0] = sign * 3
        return logits, labels

    rule = fit_rule("stopping", *draw(4000), [1.0, 1.1, 3.0])
    logits, _ = draw(4000)
    left = rule.leave_at(logits)
    certain = np.abs(logits[:, 0, 0]) > 0.2
    assert any((row[certain] < 2).all() and (row[~certain] == 2).all() for row in left)


def brute_force(reward, values):
    """The largest J over all thresholds."""
    grids = [[*np.unique(column), np.inf] for column in values[:, :-1].T]
    return max(
        reward[np.arange(len(reward)), leave_at(values, [[*limits, -np.inf]])[0]].mean()
        for limits in itertools.product(*grids)
    )


def small_problem(seed, samples=9):
    rng = np.random.default_rng(seed)
    values = rng.permuted(np.arange(samples * 3.0)).reshape(samples, 3)
    reward = (rng.random((samples, 3)) < [0.4, 0.6, 0.8]) - 0.3 * np.arange(3)
    grids = [fitted.candidates(values[:, k], samples) for k in range(2)]
    rank = np.stack([np.searchsorted(grids[k], values[:, k], side="right") for k in range(2)], axis=1)
    return reward, values, rank, np.array([len(grid) for grid in grids]), rng


def test_coordinate_ascent_never_falls_and_often_finds_the_maximum():
    best = 0
    for seed in range(60):
        reward, values, rank, sizes, rng = small_problem(seed)
        limit = brute_force(reward, values)
        starts = [fitted._backward(reward, rank, sizes), *rng.integers(0, 10, (4, 2))]
        ends = []
        for start in starts:
            chosen, course = fitted.ascend(reward, rank, start, sizes)
            assert (np.diff(course) > 0).all() and course[-1] <= limit + 1e-12
            assert course[-1] == pytest.approx(fitted.value(reward, rank > chosen), abs=1e-12)
            for k, other in itertools.product(range(2), range(10)):  # no threshold alone can do better
                moved = chosen.copy()
                moved[k] = other
                assert fitted.value(reward, rank > moved) <= course[-1] + 1e-12
            ends.append(course[-1])
        best += max(ends) >= limit - 1e-12
    assert best >= 50


@pytest.mark.parametrize("least", [2, 3, 5, 10])
def test_with_a_minimum_an_exit_is_closed_or_enough_leave_there(least):
    """The end is still the best along every open threshold, and no better than without the minimum."""
    closed_somewhere = 0
    for seed in range(30):
        reward, _, rank, sizes, _ = small_problem(seed)
        start = fitted._backward(reward, rank, sizes)
        free = fitted.ascend(reward, rank, start, sizes)
        chosen, end = fitted.ascend_with_least(reward, rank, start, sizes, least)
        leaves = rank > chosen
        left = np.bincount(np.where(leaves.any(axis=1), leaves.argmax(axis=1), 2), minlength=3)[:2]
        assert ((left == 0) | (left >= least)).all()
        assert end == pytest.approx(fitted.value(reward, leaves), abs=1e-12)
        enough = (np.bincount(fitted._exits(rank > free[0]), minlength=3)[:2] >= least) | (free[0] == sizes)
        if enough.all():
            np.testing.assert_array_equal(chosen, free[0])
        closed = chosen == sizes
        closed_somewhere += int((closed & (free[0] < sizes)).any())
        for k, other in itertools.product(np.flatnonzero(~closed), range(10)):
            moved = chosen.copy()
            moved[k] = other
            assert fitted.value(reward, rank > moved) <= end + 1e-12
    assert closed_somewhere > 0


def test_the_rule_keeps_to_the_minimum_at_all_points():
    logits, labels = outputs(0)
    rule = fit_rule("fitted", logits, labels, COSTS, least=40)
    counts = np.stack([np.bincount(row, minlength=len(COSTS)) for row in rule.leave_at(logits)])[:, :-1]
    assert ((counts == 0) | (counts >= 40)).all() and (counts > 0).any()
    free = fit_rule("fitted", logits, labels, COSTS)
    assert any(((row > 0) & (row < 40)).any() for row in map(partial_counts, free.leave_at(logits)))
    with pytest.raises(UserError, match="least is -1; expected 0 or more"):
        fit_rule("fitted", logits, labels, COSTS, least=-1)


def partial_counts(exits):
    return np.bincount(exits, minlength=len(COSTS))[:-1]


@pytest.mark.parametrize("soft", [True, False])
def test_fitted_thresholds_are_no_worse_than_shares_on_their_own_reward(soft):
    logits, labels = outputs(0)
    hits, values = correct(logits, labels), scores(logits, "confidence")
    rule = fitted.fit(fit_validation(logits, labels), soft=soft, count=600)  # every score is a candidate
    family = fit_rule("shares", logits, labels, COSTS).leave_at(logits)
    right = hits.astype(float)
    if soft:
        right = np.stack([np.interp(values[:, k], *isotonic(values[:, k], hits[:, k])) for k in range(4)], axis=1)
    gains = []
    for point, each in enumerate(prices(hits, COSTS)):
        reward = right - each * COSTS
        ours = reward[np.arange(600), rule.leave_at(logits)[point]].mean()
        shares = max(reward[np.arange(600), row].mean() for row in family)
        gains.append(ours - shares)
    assert min(gains) >= -1e-12 and max(gains) > 0


def test_patience_has_a_point_per_number_of_agreeing_exits():
    logits, labels = outputs(0, samples=50)
    rule = fit_rule("shares", logits, labels, COSTS, score="patience")
    expected = leave_at(scores(logits, "patience"), patience_thresholds(len(COSTS)))
    np.testing.assert_array_equal(rule.leave_at(logits), expected)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_deploys(name):
    """Early exit at inference makes the decisions of `leave_at` on stored outputs."""
    torch.manual_seed(0)
    network = build_network("msdnet-tiny", num_classes=5, input_shape=(1, 8, 8)).eval()
    images, costs = torch.randn(200, 1, 8, 8), np.arange(1.0, network.num_exits + 1)
    with torch.inference_mode():
        stored = torch.stack(network(images).logits, 1).numpy()
    labels = np.random.default_rng(0).integers(5, size=200)
    fitted = fit_rule(name, stored, labels, costs)
    point = fitted.points // 2
    rule = rule_from_json(fitted.at(point).to_json())
    answers = AdaptiveInference(network, rule)(images)
    assert (answers.exits.numpy() == fitted.leave_at(stored)[point]).mean() > 0.99  # a score may be at its threshold
    with pytest.raises(UserError, match="expected 4, those of the network"):
        AdaptiveInference(network, fit_rule(name, stored[:, :3], labels, costs[:3]).at(0))


def test_fitted_thresholds_accept_patience():
    logits, labels = outputs(0)
    rule = fit_rule("fitted", logits, labels, COSTS, score="patience")
    test = outputs(1, samples=60)[0]
    np.testing.assert_array_equal(deployed(rule.at(20), test), rule.leave_at(test)[20])


# jei


def test_gates_leave_as_the_formula_says():
    logits, _ = outputs(1, samples=200)
    gates = np.random.default_rng(0).normal(size=(12, 3, 5)) - [0.0, 0.0, 0.0, 0.0, 1.0]
    expected = np.full((12, 200), 3)
    for point, i in itertools.product(range(12), range(200)):
        given = earlier = 0.0  # sum of P, sum of g
        for k in range(3):
            g = 1 / (
                1
                + math.exp(
                    -jei.measures(ExitView(logits[i : i + 1, k], k))[0] @ gates[point, k, :4] - gates[point, k, 4]
                )
            )
            leave = max(0.0, min(g, 1 - earlier))
            if leave / (1 - given) >= 0.5:
                expected[point, i] = k
                break
            given, earlier = given + leave, earlier + g
    np.testing.assert_array_equal(jei.GateRule(gates).leave_at(logits), expected)
    assert set(np.unique(expected)) == {0, 1, 2, 3}


def test_measures_of_the_gates():
    logits, _ = outputs(0, samples=30, excluded=True)
    p = np.exp(logits[:, 1] - logits[:, 1].max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    squares = p**2 / (p**2).sum(axis=1, keepdims=True)
    ordered = np.sort(p, axis=1)

    def entropy(q):
        return -(q * np.log(np.where(q > 0, q, 1))).sum(axis=1)

    expected = np.stack([p.max(axis=1), entropy(p), ordered[:, -1] - ordered[:, -2], entropy(squares)], axis=1)
    np.testing.assert_allclose(jei.measures(ExitView(logits[:, 1], 1)), expected, atol=1e-12)


def test_probabilities_of_leaving_add_up():
    gates = np.random.default_rng(0).random((500, 5)) * 0.5
    before = np.cumsum(gates, axis=1) - gates
    h = np.stack([jei.leaving_probability(gates[:, k], before[:, k]) for k in range(5)], axis=1)
    leave = np.maximum(0, np.minimum(gates, 1 - before))  # P
    np.testing.assert_allclose(np.cumprod(1 - h, axis=1), 1 - np.cumsum(leave, axis=1), atol=1e-12)
    assert (np.cumsum(gates, axis=1)[:, -1] > 1).any() and (h >= 0).all() and (h <= 1).all()


def test_best_exits_at_extreme_prices():
    logits, labels = outputs(0, samples=50)
    loss = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).transpose(1, 2), torch.from_numpy(labels)[:, None].expand(-1, 4), reduction="none"
    )
    best = jei.best_exits(logits, labels, COSTS, [0.0, 0.7, 1e6])
    np.testing.assert_array_equal(best[:, 0], loss.argmin(dim=1).numpy())
    np.testing.assert_array_equal(best[:, 1], (loss.numpy() + 0.7 * COSTS / 80).argmin(axis=1))
    assert not best[:, 2].any() and (np.unique(best[:, 0]).size == 4)


def test_all_leave_at_once_at_a_high_price(monkeypatch):
    monkeypatch.setattr(jei, "PRICES", (1e6, 0.01))
    logits, labels = outputs(0, samples=4000)
    left = fit_rule("jei", logits, labels, COSTS).leave_at(outputs(1)[0])
    assert not left[0].any() and left[1].any()


def test_positive_weights():
    best = np.array([[0, 0], [0, 0], [1, 0], [2, 0], [2, 0], [2, 0], [2, 0]])
    np.testing.assert_allclose(jei.positive_weights(best, 3), [[5 / 2, 1], [5, 5]])


def test_the_gradient_of_the_gates_is_torchs():
    rng = np.random.default_rng(0)
    gates, inputs = rng.normal(size=(3, 5, 2)), rng.normal(size=(20, 3, 5))
    leaves, heavy = rng.random((20, 3, 2)) < 0.4, rng.random((3, 2)) * 5
    gradient = jei.gate_gradient(gates, inputs, leaves, np.where(leaves, heavy, 1.0))
    parameters = torch.from_numpy(gates).requires_grad_()
    logits = torch.from_numpy(inputs).transpose(0, 1) @ parameters
    for price in range(2):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits[..., price],
            torch.from_numpy(leaves[..., price]).double().T,
            pos_weight=torch.from_numpy(heavy[:, None, price]),
        )
        (slope,) = torch.autograd.grad(loss, parameters, retain_graph=True)
        np.testing.assert_allclose(gradient[..., price], slope[..., price].numpy(), atol=1e-14)


def test_the_released_loss_of_the_heads_does_not_depend_on_the_gates():
    """mean(P L sum(L) / sum(P L)) is mean(L); with the ratio detached, or without it, P does weigh the losses."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    leave = torch.rand(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def gradients(loss):
        return torch.autograd.grad(loss, [losses, leave], allow_unused=True, retain_graph=True)

    weighted = leave * losses
    released = (weighted * (losses.sum() / weighted.sum())).mean()
    of_losses, of_gates = gradients(released)
    torch.testing.assert_close(released, losses.mean())
    torch.testing.assert_close(of_losses, torch.full_like(losses, 1 / 18))
    torch.testing.assert_close(of_gates, torch.zeros_like(leave), atol=1e-15, rtol=0)
    ratio = (losses.sum() / weighted.sum()).detach()
    for meant in ((weighted * ratio).mean(), weighted.mean()):
        of_losses, of_gates = gradients(meant)
        torch.testing.assert_close(of_losses / of_losses.sum(), (leave / leave.sum()).detach())
        assert (of_gates != 0).all()


# eenet


def scheduler(limits, classes=5):
    """The rule whose scores are max p, at given thresholds."""
    points, exits = limits.shape
    weights = np.zeros((points, exits, exits + 1))
    weights[:, :, 0] = 1
    return eenet.SchedulerRule(limits, np.zeros((points, exits, classes)), weights)


def test_scheduler_with_confidences_and_fixed_shares_is_the_rule_shares():
    logits, labels = outputs(0)
    test, _ = outputs(1)
    limits = thresholds(scores(logits, "confidence"), exit_counts(600, 4, (*PAPER_SHARES, math.inf)))
    expected = fit_rule("shares", logits, labels, COSTS).leave_at(test)
    np.testing.assert_array_equal(scheduler(limits).leave_at(test), expected)


def parameters(exits=4, classes=5, seed=0):
    start = eenet.Parameters.initial(exits, classes, torch.Generator().manual_seed(seed))
    return eenet.Parameters(*(part.double() for part in start))


def inputs_of(logits):
    """x of the scheduler, [N, K, C+2], and the features of each exit."""
    parts = [eenet.features(view) for view in ExitOutputs(logits).exits]
    return torch.from_numpy(np.stack([np.column_stack(part) for part in parts], axis=1)), parts


def test_scores_of_training_are_those_of_deployment():
    logits, _ = outputs(0, samples=40, excluded=True)
    generator = torch.Generator().manual_seed(1)
    start = parameters()
    u = torch.randn(4, 5, generator=generator).double() / 2
    v = torch.randn(4, 5, generator=generator).double() / 2
    x, parts = inputs_of(logits)
    found = start._replace(u=u, v=v).scores(x.transpose(0, 1)).T
    before, expected = None, np.empty((40, 4))
    for k in range(4):
        before = eenet.exit_score(parts[k], u[k : k + 1].numpy(), v[k : k + 1].numpy(), before)
        p = torch.from_numpy(logits[:, k]).softmax(dim=1).numpy()
        sure = 1 + (p * np.log(np.where(p > 0, p, 1))).sum(axis=1) / np.log(5)
        terms = [p.max(axis=1), sure, *expected.T[:k]]
        q = p @ u[k].numpy() + sum(float(v[k, place]) * term for place, term in enumerate(terms))
        expected[:, k] = np.clip(q, 0, 1)
    np.testing.assert_allclose(before[:, 0], expected, atol=1e-12)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert 0 < ((expected > 0) & (expected < 1)).mean() < 1
    np.testing.assert_allclose(start.scores(x.transpose(0, 1)).T.numpy(), scores(logits, "confidence"), atol=1e-7)


def test_shares_of_an_exit_do_not_read_later_scores():
    generator = torch.Generator().manual_seed(0)
    x, q = torch.rand(4, 6, 7, generator=generator).double(), torch.rand(4, 6, generator=generator).double()
    start = parameters()
    logits = start.shares(start.hidden_units(x, q)).log()
    for k in range(1, 4):
        changed = q.clone()
        changed[k:] = 0
        # The logits of exits 0..k differ from each other as before; only exits beyond k read score k.
        other = start.shares(start.hidden_units(x, changed)).log()
        torch.testing.assert_close(other[: k + 1] - other[:1], logits[: k + 1] - logits[:1])
        assert k == 3 or not torch.allclose(other[k + 1] - other[0], logits[k + 1] - logits[0], atol=1e-6)


def plain_scores(of, x):
    """q, one exit after the other; earlier scores are detached."""
    q = []
    for k in range(len(x)):
        z = x[k, :, :-2] @ of.u[k] + x[k, :, -2:] @ of.v[k, :2]
        z = z + sum(of.v[k, 2 + j] * q[j].detach() for j in range(k))
        q.append(z.clamp(0, 1))
    return torch.stack(q)


def plain_shares(of, x, q):
    logits = []
    for k in range(len(x)):
        earlier = [q[j] if j < k else torch.zeros_like(q[j]) for j in range(len(x) - 1)]
        hidden = (torch.column_stack([x[k], *earlier]) @ of.hidden[k] + of.hidden_constant[k]).sigmoid()
        logits.append(hidden @ of.output[k] + of.output_constant[k])
    return torch.cat(logits, dim=1).softmax(dim=1).T


def score_loss(q, hits, shares):
    weight = shares / shares.sum(dim=1, keepdim=True)
    each = torch.nn.functional.binary_cross_entropy(q.clamp(1e-6, 1 - 1e-6), hits, weight, reduction="sum")
    return each / len(q)


def share_loss(shares, q, costs, budget):
    target = q.clamp(min=1e-6) / q.clamp(min=1e-6).sum(dim=0)
    divergence = (target * (target.log() - shares.log())).sum(dim=0).mean()
    return 1e-3 * divergence + 1e-2 * ((costs @ shares).mean() - budget).abs() / budget


@pytest.mark.parametrize("budget", [0.2, 0.9])
def test_the_gradients_of_the_scheduler_are_those_of_its_losses(budget):
    logits, labels = outputs(0, samples=60)
    generator = torch.Generator().manual_seed(1)
    x = inputs_of(logits)[0].transpose(0, 1)
    hits = torch.from_numpy(correct(logits, labels)).double().T
    costs = torch.from_numpy(COSTS / 80)
    start = parameters()
    start = start._replace(
        u=torch.randn(4, 5, generator=generator).double() / 2, v=torch.randn(4, 5, generator=generator).double() / 2
    )
    of = eenet.Parameters(*(part.clone().requires_grad_() for part in start))
    q = plain_scores(of, x)
    assert torch.allclose(q, start.scores(x)) and ((q == 0) | (q == 1)).any()
    shares = plain_shares(of, x, q.detach())
    torch.testing.assert_close(start.shares(start.hidden_units(x, q.detach())), shares.detach())
    expected = torch.autograd.grad(score_loss(q, hits, shares.detach()), of[:2])
    for found, slope in zip(eenet.score_gradient(x, q.detach(), hits, shares.detach()), expected, strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-15)
    expected = torch.autograd.grad(share_loss(shares, q.detach(), costs, budget), of[2:])
    for found, slope in zip(eenet.share_gradient(start, x, q.detach(), costs, budget), expected, strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-15)


def test_adam_is_torchs():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(3, 2, generator=generator).double(), torch.randn(4, generator=generator).double()]
    theirs = [part.clone().requires_grad_() for part in ours]
    adam = eenet._Adam(ours)
    reference = torch.optim.Adam(theirs, lr=eenet.RATE, weight_decay=eenet.DECAY)
    for _ in range(5):
        slopes = [torch.randn(part.shape, generator=generator).double() for part in ours]
        adam.step(slopes)
        for part, slope in zip(theirs, slopes, strict=True):
            part.grad = slope
        reference.step()
    for part, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(part, other.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("budget", [10.001, 20, 40, 79.99])
def test_shifted_shares_meet_the_budget_and_are_the_closest(budget):
    shares = np.random.default_rng(0).dirichlet(np.ones(4), 30)
    found = eenet.shares_at_budget(shares, COSTS, budget)
    assert (found @ COSTS).mean() == pytest.approx(budget, rel=1e-9)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    # Optimality: log(found / shares) is linear in the costs, with one slope for all samples.
    slope = np.log(found / shares)[:, 1:] - np.log(found / shares)[:, :1]
    rate = slope / (COSTS[1:] - COSTS[0])
    np.testing.assert_allclose(rate, rate[0, 0], rtol=1e-8)


def test_share_counts_are_floors():
    np.testing.assert_array_equal(eenet.share_counts(np.full((10, 4), 0.25)), [2, 2, 2])
    np.testing.assert_array_equal(eenet.share_counts(np.tile([0.1, 0.2, 0.7], (10, 1))), [1, 2])


def test_scheduler_meets_its_budgets_on_validation():
    logits, labels = outputs(0, samples=2000)
    rule = fit_rule("eenet", logits, labels, COSTS)
    found = realised(rule.leave_at(logits), correct(logits, labels), COSTS)
    budgets = 10 + 70 * np.arange(1, 13) / 13
    # Not exact: counts are rounded down, and equal scores leave together.
    np.testing.assert_allclose(found.cost, budgets, rtol=0.05)
    family = realised(fit_rule("shares", logits, labels, COSTS).leave_at(logits), correct(logits, labels), COSTS)
    assert (found.accuracy > np.interp(budgets, family.cost, family.accuracy) - 0.02).all()


def test_training_lowers_both_losses():
    logits, labels = outputs(0)
    x = inputs_of(logits)[0].float()
    hits = torch.from_numpy(correct(logits, labels)).float()
    costs = torch.tensor(COSTS / 80).float()
    start = eenet.Parameters.initial(4, 5, torch.Generator().manual_seed(0))
    kept = [part.clone() for part in start]
    end = eenet.train(start, x, hits, costs, 0.2, 12, torch.Generator().manual_seed(1))
    assert all(map(torch.equal, start, kept))

    def losses(of):
        inputs = x.transpose(0, 1)
        q = of.scores(inputs)
        r = of.shares(of.hidden_units(inputs, q))
        return score_loss(q, hits.T, torch.full_like(r, 0.25)).item(), share_loss(r, q, costs, 0.2).item()

    assert losses(end)[0] < losses(start)[0] and losses(end)[1] < losses(start)[1]


def test_a_sigmoid_before_the_softmax_limits_the_released_shares():
    """No h in (0, 1) can make a share leave [1 / (1 + 6 e), e / (e + 6)]; the linear h here can."""
    one, others = torch.tensor([1.0, *[0.0] * 6]).double(), torch.tensor([0.0, *[1.0] * 6]).double()
    assert one.softmax(0)[0].item() == pytest.approx(math.e / (math.e + 6)) == pytest.approx(0.312, abs=5e-4)
    assert others.softmax(0)[0].item() == pytest.approx(1 / (1 + 6 * math.e)) == pytest.approx(0.058, abs=5e-4)
    far = parameters(7)._replace(output_constant=torch.tensor([0.0, *[-20.0] * 6]).double()[:, None, None])
    hidden = far.hidden_units(torch.rand(7, 3, 7).double(), torch.rand(7, 3).double())
    assert far.shares(hidden)[0].min() > 0.99


def test_the_released_class_term_is_that_of_the_first_sample():
    """[N, 1] + [N, 1, 1] broadcasts to [N, N, 1]; its column 0 pairs every sample with the first one's class term."""
    generator = torch.Generator().manual_seed(0)
    of_classes, of_rest = torch.rand(5, 1, generator=generator), torch.rand(5, 1, generator=generator)
    released = of_classes + of_rest.unsqueeze(-1)
    assert released.shape == (5, 5, 1)
    torch.testing.assert_close(released[:, 0], of_classes[0] + of_rest)
    assert not torch.allclose(released[:, 0], of_classes + of_rest)
    # Its column 0, stacked over past exits, has three dimensions, and the inputs two.
    with pytest.raises(RuntimeError, match=r"[Dd]imension|same number"):
        torch.cat([torch.rand(5, 7), torch.stack([released[:, 0]], dim=-1)], dim=-1)


def test_the_json_text_has_no_infinite_numbers():
    rule = scheduler(np.array([[math.inf, 0.5, -math.inf]])).at(0)
    parts = json.loads(rule.to_json(), parse_constant=lambda word: pytest.fail(word))
    assert parts["rule"]["name"] == "eenet" and parts["rule"]["limits"] == {
        "shape": [1, 3],
        "values": ["inf", 0.5, "-inf"],
    }
    np.testing.assert_array_equal(rule_from_json(rule.to_json()).limits, rule.limits)


def test_planned_costs_of_shares_are_those_of_the_points():
    """The cost on the samples of the fit is the planned one, up to the rounding of the counts."""
    logits, labels = outputs(0, samples=5000)
    cost = realised(fit_rule("shares", logits, labels, COSTS).leave_at(logits), correct(logits, labels), COSTS).cost
    planned = planned_cost([float(q) for q in PAPER_SHARES], COSTS)
    np.testing.assert_allclose(cost[:-1], planned, rtol=2e-3)
