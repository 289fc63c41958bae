"""Risk control against plain loops, whole distributions and simulated truths."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from exitkit.errors import UserError
from exitkit.inference.risk import (
    CONTROLS,
    LABELLED,
    RISKS,
    TESTS,
    binomial_p_values,
    controlled_point,
    controlled_points,
    exit_losses,
    exits_to_control,
    hoeffding_bentkus_p_values,
    losses_at,
    p_values,
    risk_controlled,
    samples_needed,
)
from exitkit.inference.scores import confidence
from exitkit.inference.thresholds import leave_at


def outputs(seed=0, samples=50, exits=3, classes=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    return 2 * rng.normal(size=(samples, exits, classes)) + 2 * np.eye(classes)[labels][:, None], labels


def loop_loss(name, early, full, label):
    """The definition in words, for one sample."""
    p, q, onehot = softmax(early), softmax(full), np.eye(len(early))
    if name == "gap":
        return float(early.argmax() != label) - float(full.argmax() != label)
    if name == "consistency":
        return float(early.argmax() != full.argmax())
    if name == "hellinger":
        return math.sqrt(((np.sqrt(p) - np.sqrt(q)) ** 2).sum()) / math.sqrt(2)
    target = onehot[label if name == "brier" else full.argmax()]
    return (((p - target) ** 2).sum() - ((q - target) ** 2).sum()) / 2


@pytest.mark.parametrize("name", RISKS)
def test_the_losses_of_exits_are_those_computed_sample_by_sample(name):
    logits, labels = outputs()
    found = exit_losses(name, logits, labels)
    expected = [[loop_loss(name, z[k], z[-1], y) for k in range(3)] for z, y in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found[:, -1] == 0).all() and found[:, 0].any()
    left = leave_at(confidence(logits), [[0.9, 0.8, -np.inf], [0.5, 0.7, -np.inf], [np.inf, np.inf, -np.inf]])
    at_points = losses_at(found, left)
    for p in range(3):
        assert at_points[p].tolist() == [found[n, left[p, n]] for n in range(50)]


@pytest.mark.parametrize("name", RISKS)
@given(seed=st.integers(0, 2**32 - 1))
def test_losses_are_bounded_also_for_certain_and_excluded_classes(name, seed):
    rng = np.random.default_rng(seed)
    logits = rng.choice([-np.inf, 0.0, 1.0, 800.0], size=(30, 3, 4))
    logits[:, :, 0] = np.maximum(logits[:, :, 0], 0.0)
    found = exit_losses(name, logits, rng.integers(0, 4, 30))
    assert ((found >= -1) & (found <= 1)).all()
    if name in ("consistency", "hellinger"):
        assert (found >= 0).all()


def test_the_largest_losses_are_reached():
    sure = np.array([[[-np.inf, 0.0], [0.0, -np.inf]]])  # the first exit is sure of class 1, the last of class 0
    for name in RISKS:
        assert exit_losses(name, sure, [0])[0, 0] == pytest.approx(1)
    assert exit_losses("gap", sure, [1])[0, 0] == exit_losses("brier", sure, [1])[0, 0] == -1


def test_the_gap_is_at_most_the_inconsistency_of_each_sample():
    logits, labels = outputs(1, samples=400)
    gap, consistency = exit_losses("gap", logits, labels), exit_losses("consistency", logits)
    assert (gap <= consistency).all() and (gap < consistency).any()


@pytest.mark.parametrize("name", RISKS)
def test_only_the_risks_that_are_said_to_need_labels_do(name):
    logits, labels = outputs(2)
    if name in LABELLED:
        with pytest.raises(UserError, match="needs labels; without them: consistency, brier-top, hellinger"):
            exit_losses(name, logits)
        assert not np.array_equal(exit_losses(name, logits, labels), exit_losses(name, logits, (labels + 1) % 4))
    else:
        assert np.array_equal(exit_losses(name, logits), exit_losses(name, logits, labels))


def test_log_probabilities_have_the_losses_of_their_logits():
    logits, labels = outputs(3)
    logp = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    for name in RISKS:
        np.testing.assert_allclose(exit_losses(name, logp, labels), exit_losses(name, logits, labels), atol=1e-12)


# p-values


@given(st.lists(st.integers(0, 1), max_size=12), st.floats(0, 1))
def test_binomial_p_values_are_the_sum_of_the_distribution(losses, limit):
    n, errors = len(losses), sum(losses)
    expected = sum(math.comb(n, s) * limit**s * (1 - limit) ** (n - s) for s in range(errors + 1))
    assert binomial_p_values(np.reshape(losses, (1, n)), limit)[0] == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.01, 1))
def test_hoeffding_bentkus_p_values_are_the_formula(losses, limit):
    n, total = len(losses), float(np.sum(losses))
    mean = min(total / n, limit) if n else limit

    def part(a, b):
        return 0.0 if a == 0 else math.inf if b == 0 else a * math.log(a / b)

    kl = max(part(mean, limit) + part(1 - mean, 1 - limit), 0.0) if n else 0.0
    hoeffding = math.exp(-n * kl)
    tail = sum(math.comb(n, s) * limit**s * (1 - limit) ** (n - s) for s in range(min(math.ceil(total), n) + 1))
    found = hoeffding_bentkus_p_values(np.reshape(losses, (1, n)), limit)[0]
    assert found == pytest.approx(min(hoeffding, math.e * tail, 1), abs=1e-9)


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("limit", [0.05, 0.3])
@pytest.mark.parametrize("per_exit", [False, True])
def test_of_all_sequences_under_the_null_no_more_than_p_have_a_p_value_of_p_or_less(test, limit, per_exit):
    # Each sample does not count, or has loss 0 or 1, with mean exactly the limit: the whole distribution.
    share = 0.6 if per_exit else 1.0
    rows = np.array(list(itertools.product([-1, 0, 1] if per_exit else [0, 1], repeat=8)))
    chance = {-1: 1 - share, 0: share * (1 - limit), 1: share * limit}
    weight = np.vectorize(chance.get)(rows).prod(axis=1)
    assert weight.sum() == pytest.approx(1)
    p = p_values(test, np.maximum(rows, 0), limit, 0.1, rows >= 0 if per_exit else None)
    order = np.argsort(p)
    reached = np.cumsum(weight[order])
    assert (reached[np.searchsorted(p[order], p[order], side="right") - 1] <= p[order] + 1e-12).all()
    assert p.min() < 0.8


@pytest.mark.parametrize("test", ["binomial", "hoeffding-bentkus"])
def test_these_p_values_do_not_depend_on_the_order_and_count_negative_losses_as_0(test):
    losses = np.random.default_rng(0).choice([-1, 0, 1], p=[0.1, 0.8, 0.1], size=(2, 200))
    p = p_values(test, losses, 0.2)
    np.testing.assert_allclose(p, p_values(test, losses[:, ::-1], 0.2), rtol=1e-12)
    assert np.array_equal(p, p_values(test, np.maximum(losses, 0), 0.2))
    assert (p < 0.2).all()


@pytest.mark.parametrize("test", TESTS)
def test_samples_that_do_not_count_do_not_matter(test):
    rng = np.random.default_rng(1)
    losses, counted = (rng.random((3, 60)) < 0.1).astype(float), rng.random((3, 60)) < 0.7
    other = np.where(counted, losses, 1 - losses)
    assert np.array_equal(p_values(test, losses, 0.3, 0.1, counted), p_values(test, other, 0.3, 0.1, counted))
    if test != "betting":
        for row in range(3):
            alone = p_values(test, losses[row : row + 1, counted[row]], 0.3)
            assert p_values(test, losses, 0.3, 0.1, counted)[row] == pytest.approx(alone[0], rel=1e-12)
    assert p_values(test, losses, 0.3, 0.1, np.zeros((3, 60), dtype=bool)).tolist() == [1, 1, 1]


# the choice of a point

PERFECT, BAD = np.zeros(2000), (np.arange(2000) % 2).astype(float)


@pytest.mark.parametrize("control", CONTROLS)
def test_the_sequence_ends_at_the_first_point_that_fails(control):
    losses = [PERFECT, BAD, PERFECT]
    assert controlled_point(losses, [3.0, 2.0, 1.0], 0.05, 0.1, control) == 0
    assert controlled_point(losses, [2.0, 1.0, 3.0], 0.05, 0.1, control) == 0
    assert controlled_point(losses, [2.0, 3.0, 1.0], 0.05, 0.1, control) is None
    assert controlled_point([BAD, PERFECT, PERFECT], [1.0, 2.0, 3.0], 0.05, 0.1, control) == 1
    assert controlled_point(losses, [1.0, 3.0, 2.0], 1.0, 0.1, control) == 0  # all pass: the cheapest


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("samples", [0, 1, 20])
def test_few_samples_prove_nothing_about_a_small_risk(control, samples):
    found = controlled_point(np.zeros((1, samples)), [1.0], 0.01, 0.1, control)
    assert found == (0 if control == "naive" and samples else None)


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("epsilon", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("delta", [0.05, 0.3])
def test_fewer_samples_than_needed_cannot_pass_and_the_full_network_passes_with_some_more(test, epsilon, delta):
    assert samples_needed(test, 1e-300, delta) == 10**15 < samples_needed(test, 1e-9, delta) * 10**7
    needed = samples_needed(test, epsilon, delta)
    per_exit = samples_needed(test, epsilon, delta, per_exit=True)
    assert needed <= per_exit or test == "betting"  # whose number per exit is a lower bound
    counted = np.arange(5000) < per_exit - 1
    assert p_values(test, np.zeros((1, 5000)), epsilon, delta, counted[None])[0] > delta
    assert p_values(test, np.zeros((1, needed - 1)), epsilon, delta)[0] > delta
    assert p_values(test, np.zeros((1, needed)), epsilon, delta)[0] <= delta * (1 + 1e-12)
    assert controlled_point(np.zeros((1, 12 * needed)), [1.0], epsilon, delta, test) == 0


def drawn(rng, risks, samples):
    """Losses 0 and 1 of the given means, points independent."""
    return (rng.random((len(risks), samples)) < np.array(risks)[:, None]).astype(float)


def allowed(delta, runs):
    return runs * delta + 3 * math.sqrt(runs * delta * (1 - delta))


@pytest.mark.parametrize("control", [*TESTS, "naive"])
@pytest.mark.parametrize("risks", [[0.1], [0.02, 0.1, 0.12], [0.1] * 6])
def test_a_point_of_too_high_a_risk_is_chosen_no_more_often_than_promised(control, risks):
    rng, delta, failures, chosen = np.random.default_rng(3), 0.1, 0, 0
    for run in range(1000):
        found = controlled_point(drawn(rng, risks, 300), -np.arange(len(risks)), 0.1, delta, control, seed=run)
        chosen += found is not None
        failures += found is not None and risks[found] >= 0.1
    if control == "naive":  # what a guarantee is for
        assert failures > 350
    else:
        assert 0 < failures <= allowed(delta, 1000)
        assert chosen > 900 or risks[0] == 0.1


def monotone(rng, samples, points=200):
    """Points whose loss is 1 for a sample as soon as the point's boldness reaches its own; the risk is the boldness."""
    boldness = np.linspace(0, 0.3, points)
    return boldness, (rng.random(samples) < boldness[:, None]).astype(float)


def test_the_expected_risk_of_conformal_risk_control_is_at_most_epsilon():
    rng, risks = np.random.default_rng(4), []
    for _ in range(2000):
        boldness, losses = monotone(rng, 100)
        risks.append(boldness[controlled_point(losses, -boldness, 0.1, control="crc")])
    error = np.std(risks) / math.sqrt(2000)
    assert 0.085 < np.mean(risks) <= 0.1 + 2 * error
    # Controlled on average only: not in nine of ten draws.
    assert (np.array(risks) > 0.1).mean() > 0.2


def test_conformal_risk_control_replaces_each_loss_by_the_largest_so_far():
    # Each point alone has a mean loss of 0.1, but half of the samples lose at one of the points.
    losses = (np.arange(1000) % 10 == np.arange(5)[:, None]).astype(float)
    assert controlled_point(losses, [5.0, 4.0, 3.0, 2.0, 1.0], 0.35, control="crc") == 2
    assert controlled_point(losses, [5.0, 4.0, 3.0, 2.0, 1.0], 0.35, control="naive") == 4
    # (N R + 1) / (N + 1) exactly at epsilon passes.
    assert controlled_point([[0.0] * 8 + [1.0]], [1.0], 0.2, control="crc") == 0
    assert controlled_point([[0.0] * 8 + [1.0]], [1.0], 0.2 - 1e-9, control="crc") is None


def test_conformal_risk_control_is_bolder_than_betting_and_naive_boldest_on_a_monotone_path():
    rng = np.random.default_rng(5)
    for run in range(30):
        boldness, losses = monotone(rng, 3000)
        found = [controlled_point(losses, -boldness, 0.1, 0.1, c, seed=run) for c in (*TESTS, "crc", "naive")]
        assert max(found[:3]) <= found[3] <= found[4]
        assert boldness[min(found[:3])] > 0.07


# per exit


def left_at(rng, points, samples, first=0.3):
    return (rng.random((points, samples)) >= first).astype(int)


@pytest.mark.parametrize("test", TESTS)
def test_a_point_with_one_exit_of_too_high_a_risk_is_chosen_no_more_often_than_promised(test):
    # At exit 1 the risk is epsilon; over all samples it is half of it.
    rng, found = np.random.default_rng(6), {"per exit": 0, "over all": 0}
    for run in range(1000):
        left = left_at(rng, 1, 500)
        losses = (rng.random(left.shape) < np.where(left == 0, 0.2, 0.05)).astype(float)
        found["per exit"] += controlled_point(losses, [1.0], 0.2, 0.1, test, exit_index=left, seed=run) is not None
        found["over all"] += controlled_point(losses, [1.0], 0.2, 0.1, test, seed=run) is not None
    assert 0 < found["per exit"] <= allowed(0.1, 1000)
    assert found["over all"] > 990


@pytest.mark.parametrize("test", TESTS)
def test_a_point_whose_exits_all_have_a_low_risk_passes(test):
    rng, passed = np.random.default_rng(7), 0
    for run in range(50):
        left = left_at(rng, 2, 2000)
        losses = (rng.random(left.shape) < np.array([[0.02], [0.05]])).astype(float)
        passed += controlled_point(losses, [2.0, 1.0], 0.1, 0.1, test, exit_index=left, seed=run) == 1
    assert passed >= 45


def test_control_per_exit_is_the_largest_p_value_of_the_exits():
    rng = np.random.default_rng(8)
    left, losses = rng.integers(0, 4, (6, 800)), drawn(rng, [0.05, 0.14, 0.15, 0.16, 0.17, 0.18], 800)
    order = np.random.default_rng(9).permutation(800)
    for test in TESTS:
        p = [p_values(test, losses[:, order], 0.2, 0.1, left[:, order] <= k) for k in range(4)]
        passes = np.max(p, axis=0) <= 0.1
        passed = int(np.logical_and.accumulate(passes).sum())
        assert 0 < passed < 6
        found = controlled_point(losses, -np.arange(6), 0.2, 0.1, test, exit_index=left, seed=9)
        assert found == passed - 1


@pytest.mark.parametrize("test", TESTS)
def test_an_exit_where_nobody_leaves_passes_only_with_those_of_the_next(test):
    left, losses = np.array([[2] * 1000, [0] * 10 + [1] * 490 + [2] * 500]), np.zeros((2, 1000))
    cost, rates = [2.0, 1.0], [[0.0, 0.0, 1.0], [0.01, 0.49, 0.5]]
    assert controlled_point(losses, cost, 0.05, 0.1, test, exit_index=left) is None
    exits = exits_to_control(test, rates, 1000, 0.05, 0.1)
    assert exits.tolist() == [[False, False, True], [False, True, True]]
    assert controlled_point(losses, cost, 0.05, 0.1, test, exit_index=left, exits=exits) == 1
    # The exit that is pooled still counts: its losses are those of the next.
    losses[1, :10], losses[1, 10:35] = 1.0, 1.0
    assert controlled_point(losses, cost, 0.05, 0.1, test, exit_index=left, exits=exits) == 0


@pytest.mark.parametrize("test", TESTS)
def test_the_full_network_does_not_end_the_tests_per_exit(test):
    """It has no exit to control: the points after it are tested as if it were not there, and it is never returned."""
    rng = np.random.default_rng(10)
    left = left_at(rng, 3, 2000)
    losses = (rng.random(left.shape) < np.array([[0.01], [0.02], [0.5]])).astype(float)
    found = controlled_point(losses, [3.0, 2.0, 1.0], 0.1, 0.1, test, exit_index=left)
    assert found == 1
    full = np.full((1, 2000), left.max())
    both = np.concatenate([full, left]), np.concatenate([np.zeros((1, 2000)), losses])
    assert controlled_point(both[1], [4.0, 3.0, 2.0, 1.0], 0.1, 0.1, test, exit_index=both[0]) == found + 1
    assert controlled_point(np.zeros((1, 2000)), [4.0], 0.1, 0.1, test, exit_index=full) is None
    # A point that nobody leaves early, but with losses, is not the full network.
    wrong = both[1].copy()
    wrong[0, :500] = 1.0
    assert controlled_point(wrong, [4.0, 3.0, 2.0, 1.0], 0.1, 0.1, test, exit_index=both[0]) is None


def test_the_exits_to_control_are_those_at_which_enough_samples_have_left():
    needed = samples_needed("binomial", 0.1, 0.1, per_exit=True)
    assert needed == math.ceil(math.log(0.1) / math.log(0.9)) == 22
    rates = np.array([[0.21, 0.0, 0.79], [0.22, 0.0, 0.78], [0.0, 0.0, 1.0]])
    found = exits_to_control("binomial", rates, 100, 0.1, 0.1)
    assert found.tolist() == [[False, False, True], [True, True, True], [False, False, True]]
    assert exits_to_control("binomial", rates, 3, 0.1, 0.1).sum(axis=1).tolist() == [1, 1, 1]


# several levels and the earlier function


def test_several_levels_are_sequences_of_their_own_and_joint_ones_share_delta():
    rng = np.random.default_rng(10)
    losses, cost = drawn(rng, np.linspace(0.01, 0.2, 40), 1500), -np.arange(40)
    levels, options = [0.05, 0.1, 0.15, 0.001], {"exit_index": left_at(rng, 40, 1500, 0.5), "seed": 3}
    for control in CONTROLS:
        alone = [controlled_point(losses, cost, e, 0.2, control) for e in levels]
        assert controlled_points(losses, cost, levels, 0.2, control) == alone
        assert None not in alone[:3] and alone[0] < alone[1] < alone[2] and alone[3] is None
    for test in TESTS:
        joint = [controlled_point(losses, cost, e, 0.05, test, **options) for e in levels]
        assert controlled_points(losses, cost, levels, 0.2, test, jointly=True, **options) == joint
    assert controlled_points(losses, cost, [], jointly=True) == []


def test_the_gap_by_betting_is_risk_controlled():
    logits, labels = outputs(11, samples=3000, exits=4)
    limits = np.stack([np.full(4, t) for t in np.linspace(0.3, 0.99, 12)])
    left = leave_at(confidence(logits), limits)
    correct = logits.argmax(axis=2) == labels[:, None]
    losses = losses_at(exit_losses("gap", logits, labels), left)
    for seed, epsilon in itertools.product(range(3), (0.03, 0.06, 0.2)):
        expected = risk_controlled(
            correct[:, -1], correct[np.arange(3000), left], np.arange(12), epsilon, 0.1, seed=seed
        )
        assert controlled_point(losses, np.arange(12), epsilon, 0.1, seed=seed) == expected


def test_input_that_makes_no_sense_is_refused_in_one_line():
    logits, labels = outputs()
    with pytest.raises(UserError, match="did you mean brier"):
        exit_losses("brir", logits, labels)
    with pytest.raises(UserError, match=r"expected \[N, K, C\]"):
        exit_losses("gap", logits[0], labels)
    with pytest.raises(UserError, match="labels"):
        exit_losses("gap", logits, labels + 1)
    broken = logits.copy()
    broken[3, 1, 2] = np.nan
    for name in RISKS:
        with pytest.raises(UserError, match="exit 2"):
            exit_losses(name, broken, labels)
    losses = np.zeros((2, 10))
    with pytest.raises(UserError, match="did you mean binomial"):
        controlled_point(losses, [1, 2], 0.1, control="binomal")
    for call in (lambda: p_values("crc", losses, 0.1), lambda: samples_needed("crc", 0.1, 0.1)):
        with pytest.raises(UserError, match="unknown test 'crc'"):
            call()
    for control in CONTROLS:
        for epsilon in (0.0, 1.1, math.nan):
            with pytest.raises(UserError, match="epsilon"):
                controlled_point(losses, [1, 2], epsilon, control=control)
        with pytest.raises(UserError, match="delta"):
            controlled_point(losses, [1, 2], 0.1, 1.0, control)
        for bad in (1.5, -1.5, math.nan):
            with pytest.raises(UserError, match="outside"):
                controlled_point(losses + bad, [1, 2], 0.1, control=control)
        with pytest.raises(UserError, match="one per operating point"):
            controlled_point(losses, [1], 0.1, control=control)
        with pytest.raises(UserError, match=r"expected \[P, N\]"):
            controlled_point(losses[0], [1], 0.1, control=control)
    with pytest.raises(UserError, match="hoeffding-bentkus"):
        controlled_point(losses + 0.5, [1, 2], 0.1, control="binomial")
    for p in (binomial_p_values, hoeffding_bentkus_p_values):
        for limit in (-0.1, 1.1, math.nan):
            with pytest.raises(UserError, match="limit"):
                p(losses, limit)


def test_control_per_exit_that_makes_no_sense_is_refused():
    losses, left = np.zeros((2, 10)), np.zeros((2, 10), dtype=int)
    for control in ("crc", "naive"):
        with pytest.raises(UserError, match="expected one of betting, binomial, hoeffding-bentkus"):
            controlled_point(losses, [1, 2], 0.1, control=control, exit_index=left)
    with pytest.raises(UserError, match="shape"):
        controlled_point(losses, [1, 2], 0.1, exit_index=left[:, :5])
    with pytest.raises(UserError, match="without exit_index"):
        controlled_point(losses, [1, 2], 0.1, exits=[[True], [True]])
    for exits in ([True, True], [[True]], [[True], [False]]):
        with pytest.raises(UserError, match="one or more for each point"):
            controlled_point(losses, [1, 2], 0.1, exit_index=left, exits=exits)
    with pytest.raises(UserError, match="one or more for each point"):
        controlled_point(losses, [1, 2], 0.1, exit_index=left + 1, exits=[[True], [True]])
