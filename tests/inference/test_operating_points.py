"""Operating points against every assignment, every sequence, plain loops and simulated truths."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from exitkit.errors import UserError
from exitkit.inference.operating_points import held, oracle_curve, stitched
from exitkit.inference.risk import betting_p_values, risk_controlled

LEVELS = st.integers(0, 5).map(lambda level: level / 5)
"""Few values, so that many are equal."""


@given(
    arrays(bool, st.tuples(st.integers(1, 4), st.just(4))),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
)
def test_no_assignment_that_costs_no_more_than_the_oracle_is_more_accurate(hits, steps):
    prices = np.cumsum(steps)  # whole numbers: costs compare exactly
    samples = len(hits)
    cost, accuracy = oracle_curve(hits, prices)
    totals, right = np.round(cost * samples), np.round(accuracy * samples)
    every = np.array(list(itertools.product(range(4), repeat=samples)))
    paid, got = prices[every].sum(1), hits[np.arange(samples), every].sum(1)
    for total, best in zip(totals, right, strict=True):
        assert got[paid <= total].max() == best
        assert ((paid == total) & (got == best)).any()


def test_the_oracle_of_four_samples_is_the_one_computed_by_hand():
    # The first sample is solved by exits 1 and 3, the second by 2, the third by 3, the fourth by none.
    hits = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    cost, accuracy = oracle_curve(hits, [10, 20, 50])
    np.testing.assert_allclose(cost, [10, 12.5, 22.5])
    np.testing.assert_allclose(accuracy, [0.25, 0.5, 0.75])


def test_an_oracle_needs_cumulative_costs_and_samples():
    with pytest.raises(UserError, match="decrease"):
        oracle_curve(np.ones((2, 3), dtype=bool), [1, 3, 2])
    with pytest.raises(UserError, match="no samples"):
        oracle_curve(np.ones((0, 2), dtype=bool), [1, 2])


@given(st.lists(LEVELS, max_size=12))
def test_a_point_that_brings_nothing_is_not_moved_on_to(accuracy):
    best, current, expected = -1.0, 0, []
    for p, value in enumerate(accuracy):
        if value > best:
            best, current = value, p
        expected.append(current)
    found = held(accuracy)
    assert found.tolist() == expected and found.dtype == np.int64


def test_held_accuracy_and_held_cost_come_from_the_same_point():
    assert held([0.5, 0.7, 0.6, 0.7, 0.8]).tolist() == [0, 1, 1, 1, 4]


@given(st.lists(st.tuples(st.integers(0, 4), LEVELS), max_size=12))
def test_a_stitched_curve_holds_just_the_points_that_no_other_makes_needless(points):
    cost, accuracy = [c for c, _ in points], [a for _, a in points]
    kept = stitched(cost, accuracy).tolist()

    def needless(i):
        cheaper = any(c < cost[i] and a >= accuracy[i] for c, a in points)
        return cheaper or any(c == cost[i] and a > accuracy[i] for c, a in points)

    needed = {(cost[i], accuracy[i]) for i in range(len(points)) if not needless(i)}
    curve = [(cost[i], accuracy[i]) for i in kept]
    assert curve == sorted(needed)  # each once, and by cost


def test_a_curve_is_stitched_of_several_networks_points():
    cost, accuracy = [5.0, 1.0, 3.0, 3.0, 2.0, 9.0], [0.8, 0.5, 0.7, 0.75, 0.5, 0.8]
    assert stitched(cost, accuracy).tolist() == [1, 3, 0]


def loop_p_value(drops, limit, delta):
    """The gambler, sample by sample."""
    m, n = (limit + 1) / 2, len(drops)
    capital = most = 1.0
    total, squares = 0.5, 0.25
    for t, drop in enumerate(drops, start=1):
        variance = squares / t
        stake = math.sqrt(2 * math.log(1 / delta) / (n * variance))
        if m < 1:
            stake = min(stake, 0.75 / (1 - m))
        x = (drop + 1) / 2
        capital *= 1 + stake * (m - x)
        most = max(most, capital)
        total += x
        squares += (x - total / (t + 1)) ** 2
    return 1 / most


@given(
    arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(0, 30)), elements=st.floats(-1, 1)),
    st.floats(-1, 1),
    st.floats(0.001, 0.999),
)
def test_p_values_match_the_gambler_who_bets_sample_by_sample(drops, limit, delta):
    found = betting_p_values(drops, limit, delta)
    assert ((found > 0) & (found <= 1)).all()
    np.testing.assert_allclose(found, [loop_p_value(row, limit, delta) for row in drops], rtol=1e-9)


@pytest.mark.parametrize("limit", [0.02, 0.2, -0.3])
@pytest.mark.parametrize("moves", [0.4, 0.95])
def test_of_all_sequences_under_the_null_no_more_than_p_have_a_p_value_of_p_or_less(limit, moves):
    # Drops -1, 0 and 1 with mean exactly the limit: the whole distribution of the p-value, no simulation.
    rows = np.array(list(itertools.product([-1, 0, 1], repeat=7)))
    chance = np.array([(moves - limit) / 2, 1 - moves, (moves + limit) / 2])
    weight = chance[rows + 1].prod(1)
    assert weight.sum() == pytest.approx(1)
    for delta in (0.01, 0.3):
        p = betting_p_values(rows, limit, delta)
        order = np.argsort(p)
        reached = np.cumsum(weight[order])
        assert (reached[np.searchsorted(p[order], p[order], side="right") - 1] <= p[order] + 1e-12).all()
        assert p.min() < 0.5


def test_p_values_fall_fast_where_the_drop_is_well_below_the_limit():
    rng = np.random.default_rng(0)
    drops = rng.choice([-1, 0, 1], p=[0.02, 0.96, 0.02], size=(3, 5000))
    assert (betting_p_values(drops, 0.02) < 1e-3).all()
    assert (betting_p_values(drops, -0.02) > 0.05).all()


def test_a_capital_beyond_all_floats_is_no_trouble():
    drops = np.full((2, 100000), -1.0)
    drops[1] = 1.0
    assert betting_p_values(drops, 0.9).tolist() == [0.0, 1.0]


def test_bets_that_make_no_sense_are_refused():
    for limit in (1.5, -1.5, math.nan):
        with pytest.raises(UserError, match="limit"):
            betting_p_values([[0.0]], limit)
    for drop in (1.1, -1.1, math.nan):
        with pytest.raises(UserError, match="drops"):
            betting_p_values([[0.0, drop]], 0.1)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(UserError, match="delta"):
            betting_p_values([[0.0]], 0.1, delta)


def drawn(rng, true_drops, samples, moves=0.15):
    """A full network's and operating points' hits with the true drops in accuracy given, points independent."""
    full = rng.random(samples) < 0.8
    leaving = []
    for drop in true_drops:
        # Of those that the full network gets right some are lost, of those that it gets wrong some are won.
        won = (moves - drop) / 2 / 0.2
        lost = (moves + drop) / 2 / 0.8
        leaving.append(np.where(full, rng.random(samples) >= lost, rng.random(samples) < won))
    return full, np.array(leaving)


def allowed(delta, runs):
    return runs * delta + 3 * math.sqrt(runs * delta * (1 - delta))


@pytest.mark.parametrize("true_drops", [[0.05], [0.0, 0.05, 0.06], [0.05] * 10])
@pytest.mark.parametrize("delta", [0.1, 0.3])
def test_a_point_that_loses_epsilon_is_chosen_no_more_often_than_promised(true_drops, delta):
    rng, chosen = np.random.default_rng(11), []
    for run in range(400):
        full, leaving = drawn(rng, true_drops, 800)
        chosen.append(risk_controlled(full, leaving, -np.arange(len(leaving)), 0.05, delta, seed=run))
    failures = sum(index is not None and true_drops[index] >= 0.05 for index in chosen)
    assert failures <= allowed(delta, 400)
    # The promise is not kept by choosing nothing at all.
    assert failures > 0
    if true_drops[0] == 0:
        assert sum(index is not None for index in chosen) > 300


def test_the_cheapest_of_the_points_that_lose_far_less_than_epsilon_is_found():
    rng = np.random.default_rng(12)
    found = []
    for _ in range(50):
        full, leaving = drawn(rng, [0.08, -0.01, 0.01, 0.0, 0.15], 3000)
        found.append(risk_controlled(full, leaving, [3.0, 9.0, 4.0, 6.0, 1.0], 0.05, 0.1))
    assert found.count(2) >= 45


def test_testing_stops_at_the_first_point_that_fails():
    full = np.ones(2000, dtype=bool)
    bad, good = np.arange(2000) % 2 == 0, full
    assert risk_controlled(full, [good, bad, good], [3.0, 2.0, 1.0], 0.05, 0.1) == 0
    assert risk_controlled(full, [good, bad, good], [2.0, 1.0, 3.0], 0.05, 0.1) == 0
    assert risk_controlled(full, [good, bad, good], [2.0, 3.0, 1.0], 0.05, 0.1) is None
    assert risk_controlled(full, [bad, good, good], [1.0, 2.0, 3.0], 0.05, 0.1) == 1


def test_too_few_samples_prove_nothing():
    full = np.ones(20, dtype=bool)
    assert risk_controlled(full, [full], [1.0], 0.05, 0.1) is None
    assert risk_controlled(full[:0], [full[:0]], [1.0], 0.05, 0.1) is None


def test_samples_that_lie_sorted_do_not_deceive():
    # All that is lost lies at the end: a gambler who went through in this order would grow rich first.
    full, leaving = np.ones(2000, dtype=bool), np.arange(2000) < 1500
    assert betting_p_values([full.astype(float) - leaving], 0.1)[0] < 0.01
    for seed in range(20):
        assert risk_controlled(full, [leaving], [1.0], 0.1, 0.01, seed=seed) is None


def test_an_epsilon_or_a_delta_outside_its_range_is_refused():
    full = np.ones(10, dtype=bool)
    for epsilon in (0.0, -0.1, 1.5, math.nan):
        with pytest.raises(UserError, match="epsilon"):
            risk_controlled(full, [full], [1.0], epsilon, 0.1)
    for delta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(UserError, match="delta"):
            risk_controlled(full, [full], [1.0], 0.1, delta)
    assert risk_controlled(np.ones(100), np.ones((1, 100)), [1.0], 1.0, 0.1) == 0
