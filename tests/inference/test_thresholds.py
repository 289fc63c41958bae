from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import pytest

from exitkit.errors import UserError
from exitkit.inference.scores import confidence
from exitkit.inference.thresholds import (
    PAPER_SHARES,
    anytime_accuracy,
    budgeted,
    correct,
    exit_counts,
    leave_at,
    planned_cost,
    share_for_budget,
    shares,
    thresholds,
)


def loop_thresholds(scores, counts):
    """The papers' search as a plain loop, for one operating point."""
    samples, exits = scores.shape
    alive, found = set(range(samples)), []
    for k in range(exits - 1):
        left = sorted((scores[i, k] for i in alive), reverse=True)
        n = counts[k]
        found.append(left[n - 1] if 1 <= n <= len(left) else math.inf)
        alive -= {i for i in alive if scores[i, k] >= found[-1]}
    return [*found, -math.inf]


def loop_leave(scores, limits):
    return [next(k for k in range(len(limits)) if row[k] >= limits[k]) for row in scores]


def random_scores(seed, samples=60, exits=5, levels=None):
    scores = np.random.default_rng(seed).random((samples, exits))
    return scores if levels is None else np.round(scores * levels) / levels


@pytest.mark.parametrize("levels", [None, 20, 3, 1])
@pytest.mark.parametrize("seed", range(4))
def test_thresholds_and_exits_match_the_loop(seed, levels):
    scores, test = random_scores(seed, levels=levels), random_scores(seed + 100, samples=37, levels=levels)
    counts = np.concatenate([exit_counts(60, 5), np.random.default_rng(seed).integers(0, 61, (20, 4))])
    limits = thresholds(scores, counts)
    np.testing.assert_array_equal(limits, [loop_thresholds(scores, row) for row in counts])
    np.testing.assert_array_equal(leave_at(test, limits), [loop_leave(test, row) for row in limits])


def test_zero_and_too_many_close_an_exit_and_ties_take_more():
    scores = np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.8, 0.3, 0], [0.1, 0.4, 0]])
    limits = thresholds(scores, [[0, 4], [2, 1], [2, 2], [4, 0]])
    inf = math.inf
    np.testing.assert_array_equal(limits[:, :2], [[inf, 0.1], [0.8, 0.4], [0.8, inf], [0.1, inf]])
    np.testing.assert_array_equal(limits[:, 2], -inf)
    np.testing.assert_array_equal(leave_at(scores, limits), [[1] * 4, [0, 0, 0, 1], [0, 0, 0, 2], [0] * 4])


def test_counts_of_the_papers_grid_are_exact():
    for samples in (1, 197, 500, 5000, 50000):
        for exits in (2, 4, 7, 10):
            counts = exit_counts(samples, exits)
            for p, row in zip(range(1, 40), counts, strict=True):
                q = Fraction(p, 20)
                total = sum(q**k for k in range(1, exits + 1))
                assert row.tolist() == [math.floor(samples * q**k / total) for k in range(1, exits)]


def test_counts_are_not_moved_by_rounding():
    # 49 * (1 / 49) is 0.9999999999999999 in floating point.
    assert exit_counts(7 * 1000, 3, [2.0]).tolist() == [[1000, 2000]]
    assert exit_counts(49, 49, [1.0]).tolist() == [[1] * 48]
    assert exit_counts(10, 3, [0.0, math.inf]).tolist() == [[10, 0], [0, 0]]


def test_shares_have_their_closed_forms():
    np.testing.assert_allclose(shares([1.0], 5), np.full((1, 5), 0.2), rtol=1e-15)
    sevenths = np.array([[1, 2, 4], [4, 2, 1]]) / 7
    np.testing.assert_allclose(shares([2.0, 0.5], 3), sevenths, rtol=1e-15)
    extremes = shares([0.0, math.inf, 1e-300, 1e300], 3)
    np.testing.assert_array_equal(extremes[:, [0, 2]], [[1, 0], [0, 1], [1, 0], [0, 1]])
    assert shares([1.95], 5)[0, -1] == pytest.approx(0.505, abs=5e-4)


def test_confidence_and_accuracy():
    logits = np.random.default_rng(0).normal(size=(50, 3, 7)).astype(np.float16) * 40
    wide = logits.astype(np.float64)
    softmax = np.exp(wide - wide.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    found = confidence(logits)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, softmax.max(-1), rtol=1e-13)
    labels = wide[:, 1].argmax(-1)
    expected = [np.mean([wide[n, k].argmax() == labels[n] for n in range(50)]) for k in range(3)]
    np.testing.assert_allclose(anytime_accuracy(logits, labels), expected)
    assert anytime_accuracy(logits, labels)[1] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_refused(bad):
    logits = np.zeros((4, 2, 3))
    logits[2, 1, 0] = bad
    with pytest.raises(UserError, match="exit 2"):
        confidence(logits)


def random_outputs(seed, samples=200, exits=4, classes=5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    return rng.normal(size=(samples, exits, classes)) + 2 * np.eye(classes)[labels][:, None], labels


def test_budgeted_matches_the_loop():
    (val, _), (test, labels) = random_outputs(0), random_outputs(1, samples=150)
    costs, counts = np.array([1.0, 3.0, 4.5, 9.0]), exit_counts(200, 4)
    hits, scores = correct(test, labels), confidence(test)
    result = budgeted(confidence(val), scores, hits, costs, counts)
    for i, row in enumerate(counts):
        left = loop_leave(scores, loop_thresholds(confidence(val), row))
        assert result.cost[i] == pytest.approx(np.mean([costs[k] for k in left]), abs=1e-12)
        assert result.accuracy[i] == np.mean([hits[n, k] for n, k in enumerate(left)])
        np.testing.assert_allclose(result.rates[i], np.bincount(left, minlength=4) / 150, atol=1e-15)


def test_thresholds_know_neither_labels_nor_test_samples():
    (val, _), (test, labels) = random_outputs(0), random_outputs(1)
    costs, counts = [1, 2, 3, 4], exit_counts(200, 4)
    score = confidence(val)
    plain = budgeted(score, confidence(test), correct(test, labels), costs, counts)
    poisoned = budgeted(score, confidence(-test), correct(test, labels[::-1]), [9, 9, 9, 9], counts)
    np.testing.assert_array_equal(plain.thresholds, poisoned.thresholds)


def test_planned_cost_grows_with_q():
    q = np.exp(np.linspace(-30, 30, 500))
    planned = planned_cost(q, [1.0, 2.5, 2.5, 7.0])
    assert (np.diff(planned) >= 0).all()
    assert planned[0] == pytest.approx(1) and planned[-1] == pytest.approx(7)


@pytest.mark.parametrize(
    "costs", [[1, 2], [15.14e6, 25.51e6, 37.1e6, 46.33e6], [0, 1, 1, 5], [3, 3, 3, 4], range(1, 21)]
)
def test_the_budget_is_met(costs):
    costs = np.array(costs, dtype=float)
    span = costs[-1] - costs[0]
    budgets = costs[0] + span * np.array([1e-12, 1e-6, *np.linspace(0.01, 0.99, 25), 1 - 1e-6, 1 - 1e-12])
    q = share_for_budget(costs, budgets)
    assert ((q > 0) & np.isfinite(q)).all() and (np.diff(q) > 0).all()
    np.testing.assert_allclose(planned_cost(q, costs), budgets, rtol=1e-9)
    np.testing.assert_allclose(planned_cost(q, costs), budgets, rtol=0, atol=1e-9 * costs[-1])


def test_budgets_at_and_beyond_the_ends():
    costs = [2.0, 3.0, 5.0]
    q = share_for_budget(costs, [-1, 2, 5, 7])
    assert q.tolist() == [0, 0, math.inf, math.inf]
    np.testing.assert_array_equal(planned_cost(q, costs), [2, 2, 5, 5])
    assert share_for_budget(costs, [10 / 3])[0] == pytest.approx(1, rel=1e-12)
    with pytest.raises(UserError, match="decrease"):
        share_for_budget([2, 1], [1.5])


def test_the_papers_grid_is_fast():
    scores = random_scores(0, samples=10_000, exits=10)
    counts = exit_counts(10_000, 10, PAPER_SHARES)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        leave_at(scores, thresholds(scores, counts))
        times.append(time.perf_counter() - start)
    assert min(times) < 1  # about 0.05 s on one idle core; a loop over samples takes many seconds
