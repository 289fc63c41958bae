"""Combinations against closed forms, plain loops and optimality conditions; deployment against evaluation."""

import itertools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from exitkit.errors import UserError
from exitkit.inference.calibration import fit_temperatures
from exitkit.inference.combinations import (
    COMBINATIONS,
    RIDGE,
    Combination,
    _geometric_loss,
    fit_combination,
)
from exitkit.inference.scores import confidence, scores

COSTS = [1.0, 2.5, 4.0, 7.0]


def outputs(seed=0, samples=300, exits=4, classes=5, spread=1.5):
    """Exits whose errors are alike, as those of one network, and later ones better."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    shared, own = rng.normal(size=(samples, 1, classes)), rng.normal(size=(samples, exits, classes))
    signal = np.linspace(0.8, 1.6, exits)[:, None] * np.eye(classes)[labels][:, None]
    return spread * (0.5 * shared + 0.7 * own + signal), labels


def fitted(name, seed=0, **shape):
    logits, labels = outputs(seed, **shape)
    return fit_combination(name, logits, labels, COSTS[: logits.shape[1]])


def nll(logp, labels):
    return -logp[np.arange(len(labels)), labels].mean()


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_exit_gives_log_probabilities(name):
    logits, _ = outputs(1)
    combined = fitted(name)(logits)
    assert combined.shape == logits.shape and combined.dtype == np.float64
    np.testing.assert_allclose(np.exp(combined).sum(2), 1, rtol=1e-12)


@pytest.mark.parametrize("name", COMBINATIONS)
@given(seed=st.integers(0, 2**32 - 1), exit=st.integers(0, 3))
def test_an_exit_reads_no_later_exit_and_a_sample_no_other(name, seed, exit):
    combination = fitted(name, samples=60)
    logits, _ = outputs(seed, samples=12)
    changed = logits.copy()
    changed[:, exit + 1 :] = np.random.default_rng(seed).normal(size=changed[:, exit + 1 :].shape) * 9
    before, after = combination(logits), combination(changed)
    assert np.array_equal(before[:, : exit + 1], after[:, : exit + 1])
    kept = np.random.default_rng(seed).permutation(12)[:5]
    assert np.array_equal(combination(logits[kept]), before[kept])


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_exit_at_a_time_and_with_samples_that_leave_the_numbers_are_the_same(name, dtype):
    combination = fitted(name)
    logits = torch.from_numpy(outputs(2)[0]).to(dtype)
    whole = combination(logits.numpy())
    rows, carry = torch.arange(len(logits)), None
    for k in range(4):
        given_before = None if carry is None else [part.clone() for part in carry]
        combined, after = combination.step(k, logits[rows, k], carry)
        assert combined.dtype == torch.float64
        assert np.array_equal(combined.numpy(), whole[rows.numpy(), k])
        if carry is not None:  # a carry may be used again
            assert all(map(torch.equal, carry, given_before))
        stay = torch.arange(len(rows)) % 3 != k
        rows, carry = rows[stay], tuple(part[stay] for part in after)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_arithmetic_of_devices_is_that_of_evaluation(name):
    combination = fitted(name)
    logits = outputs(3)[0]
    logits[::7, 1, 2] = -np.inf
    logits[::5, 2] = -np.abs(logits[::5, 2])
    whole, carry = combination(logits), None
    for k in range(4):
        combined, carry = combination._advance(torch, k, torch.from_numpy(logits[:, k].copy()), carry)
        np.testing.assert_allclose(combined.numpy(), whole[:, k], rtol=1e-10)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_on_a_device_logits_that_are_not_finite_end_as_nan(name):
    for bad in (math.nan, math.inf):
        logits = torch.from_numpy(outputs(3, samples=4)[0])
        logits[0, 2, 1] = bad
        carry = None
        for k in range(3):
            combined, carry = fitted(name)._advance(torch, k, logits[:, k], carry)
        assert combined[0].isnan().any() and not combined[1:].isnan().any()


@pytest.mark.parametrize("name", COMBINATIONS)
def test_json_brings_back_the_same_combination(name):
    combination = fitted(name)
    text = combination.to_json()
    assert Combination.from_json(text) == combination
    assert Combination.from_json(json.dumps({**json.loads(text), "more": 1})) == combination


@pytest.mark.parametrize("name", COMBINATIONS)
def test_excluded_classes_cause_no_warning_and_stay_legal_for_scores(name):
    logits, labels = outputs(4)
    logits += 20  # positive, so that no product is empty
    wrong = (labels + 1) % 5
    logits[np.arange(300), 1, wrong] = -np.inf
    logits[np.arange(0, 300, 2), 3, wrong[::2]] = -1e308
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        combined = fit_combination(name, logits, labels, COSTS)(logits)
    assert not np.isnan(combined).any()
    for score in ("confidence", "margin", "entropy", "patience"):
        assert np.isfinite(scores(combined, score)).all()
    if name in ("product", "geometric"):  # a product with 0 is 0
        assert (combined[np.arange(300), 1:, wrong] == -np.inf).all()


def test_a_network_of_one_exit_is_left_as_it_is():
    logits, labels = outputs(5, exits=1)
    plain = log_softmax(logits, axis=2)
    for name in ("caching", "mean"):
        np.testing.assert_allclose(fit_combination(name, logits, labels, [3.0])(logits), plain, rtol=1e-12)
    np.testing.assert_allclose(Combination("geometric", 1, ((1.0,),))(logits), plain, rtol=1e-12)
    cooled = fit_combination("mie", logits, labels, [3.0])
    temperature = fit_temperatures(logits, labels)
    np.testing.assert_allclose(cooled.temperatures, temperature, rtol=1e-4)
    np.testing.assert_allclose(cooled(logits), log_softmax(logits / cooled.temperatures[0], axis=2), rtol=1e-12)
    product = fit_combination("product", logits, labels, [3.0])(logits)
    positive = np.maximum(logits, 0)
    some = positive.any(axis=2).ravel()
    np.testing.assert_allclose(np.exp(product[some]), positive[some] / positive[some].sum(2, keepdims=True))


# product


def loop_product(z):
    """[K, C] of one sample: probabilities multiplied one by one."""
    exits, answers = len(z), []
    mass, answer = np.ones(z.shape[1]), softmax(z[0])
    for j in range(exits):
        mass = mass * np.maximum(z[j], 0) ** ((j + 1) / exits)
        answer = mass / mass.sum() if mass.any() else answer
        answers.append(answer)
    return np.array(answers)


def test_a_product_multiplies_the_positive_logits_and_keeps_the_last_answer_where_none_is_left():
    logits = np.random.default_rng(0).normal(0.5, 1, size=(500, 7, 4))
    combined = np.exp(Combination("product", 7)(logits))
    np.testing.assert_allclose(combined, [loop_product(z) for z in logits], atol=1e-12)
    emptied = (np.minimum.accumulate(logits > 0, axis=1)).sum(2) == 0
    assert emptied[:, 0].any() and emptied[:, -1].mean() > 0.3 and not emptied[:, -1].all()
    for k in range(1, 7):
        assert np.array_equal(combined[emptied[:, k], k], combined[emptied[:, k], k - 1])


def test_the_support_of_a_product_is_empty_as_often_as_chance_says():
    # All C classes must have lost a positive logit at one of k + 1 exits: (1 - P(z > 0)^(k + 1))^C.
    logits = np.random.default_rng(1).normal(0.5, 1, size=(20000, 7, 10))
    combined = Combination("product", 7)(logits)
    survives = 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))
    for k in range(1, 7):
        expected = (1 - survives ** (k + 1)) ** 10
        kept = (combined[:, k] == combined[:, k - 1]).all(axis=1).mean()
        # A support of one class keeps its answer as well.
        alone = (combined[:, k - 1] > -np.inf).sum(axis=1) == 1
        empty = ((logits[:, : k + 1] > 0).all(axis=1).sum(axis=1) == 0).mean()
        assert empty == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 20000) + 1e-4)
        assert empty <= kept <= empty + alone.mean()


def test_in_a_product_confidence_falls_less_often_than_without():
    logits = np.random.default_rng(2).normal(0.5, 1, size=(20000, 5, 10))
    falls = (np.diff(confidence(Combination("product", 5)(logits)), axis=1) < -1e-12).mean()
    plain = (np.diff(confidence(logits), axis=1) < -1e-12).mean()
    assert plain == pytest.approx(0.5, abs=0.01) and falls == pytest.approx(0.068, abs=0.005)


# caching


def test_caching_answers_with_the_most_confident_exit_so_far():
    logits, _ = outputs(6)
    combined, own = Combination("caching", 4)(logits), confidence(logits)
    chosen = [[int(row[: k + 1].argmax()) for k in range(4)] for row in own]
    expected = log_softmax(logits, axis=2)[np.arange(300)[:, None], chosen]
    np.testing.assert_allclose(combined, expected, rtol=1e-12)
    assert (np.diff(confidence(combined), axis=1) >= 0).all()


def test_of_two_equally_confident_exits_the_first_is_kept():
    combined = Combination("caching", 2)(np.array([[[2.0, 0.0], [0.0, 2.0]]]))
    assert np.array_equal(combined[0, 1], combined[0, 0])


# mean and mie


def test_a_mean_is_the_mean_and_mie_weighs_it_with_the_cost():
    logits, labels = outputs(7)
    p = softmax(logits, axis=2)
    expected = np.cumsum(p, axis=1) / np.arange(1, 5)[:, None]
    np.testing.assert_allclose(np.exp(Combination("mean", 4)(logits)), expected, rtol=1e-12)
    mie = fit_combination("mie", logits, labels, COSTS)
    weights = np.array(COSTS)[:, None]
    p = softmax(logits / np.array(mie.temperatures)[:, None], axis=2)
    expected = np.cumsum(weights * p, axis=1) / np.cumsum(weights, axis=0)
    np.testing.assert_allclose(np.exp(mie(logits)), expected, rtol=1e-12)


def test_mie_of_equal_costs_and_temperatures_of_1_is_the_mean():
    logits, _ = outputs(8)
    mie = Combination("mie", 4, ((3.0,) * 4,), (), (1.0,) * 4)
    np.testing.assert_allclose(mie(logits), Combination("mean", 4)(logits), rtol=1e-12)


def test_no_temperature_of_mie_is_likelier_on_a_grid_with_those_before_it_fixed():
    logits, labels = outputs(9, spread=4.0)
    mie = fit_combination("mie", logits, labels, COSTS)
    chosen = nll_of_exits(mie, logits, labels)
    for k in range(4):
        for t in np.geomspace(0.05, 20, 120):
            other = (*mie.temperatures[:k], t, *mie.temperatures[k + 1 :])
            assert chosen[k] <= nll_of_exits(Combination("mie", 4, mie.weights, (), other), logits, labels)[k] + 1e-9
    assert (
        chosen[:2] < nll_of_exits(Combination("mie", 4, mie.weights, (), (1.0,) * 4), logits, labels)[:2] - 0.1
    ).all()
    # Under the sum the best temperature is another one than alone.
    assert np.abs(np.array(mie.temperatures) / fit_temperatures(logits, labels) - 1)[1:].max() > 0.02


def nll_of_exits(combination, logits, labels):
    combined = combination(logits)
    return np.array([nll(combined[:, k], labels) for k in range(logits.shape[1])])


def test_the_lowest_of_two_minima_in_the_temperature_is_found():
    # Exit 2 is right by far on most samples and wrong by far on the rest, which exit 1 gets right: cold is best.
    logits, labels = np.zeros((100, 2, 2)), np.zeros(100, dtype=int)
    logits[:, 0, 0] = 1.0
    logits[:80, 1, 0], logits[80:, 1, 1] = 4.0, 4.0
    mie = fit_combination("mie", logits, labels, [1.0, 1.0])
    losses = [
        nll_of_exits(Combination("mie", 2, mie.weights, (), (mie.temperatures[0], t)), logits, labels)[1]
        for t in np.geomspace(0.05, 20, 1000)
    ]
    assert nll_of_exits(mie, logits, labels)[1] == pytest.approx(min(losses), abs=1e-6)


# geometric


def test_geometric_with_weights_of_1_has_the_argmax_of_the_mean_log_probability():
    logits, _ = outputs(10)
    rows = tuple((1.0,) * (k + 1) for k in range(4))
    combined = Combination("geometric", 4, rows)(logits)
    mean = np.cumsum(log_softmax(logits, axis=2), axis=1) / np.arange(1, 5)[:, None]
    np.testing.assert_allclose(combined, log_softmax(mean, axis=2), rtol=1e-10)
    assert np.array_equal(combined.argmax(2), mean.argmax(2))


def test_geometric_with_weights_k_plus_1_is_the_renormalised_product():
    logits, _ = outputs(11, exits=2)
    combined = Combination("geometric", 2, ((1.0,), (2.0, 2.0)))(logits)
    product = softmax(logits, axis=2).prod(axis=1)
    np.testing.assert_allclose(np.exp(combined[:, 1]), product / product.sum(1, keepdims=True), rtol=1e-10)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("excluding", [True, False])
def test_the_gradient_of_the_geometric_loss_is_that_of_finite_differences(biased, excluding):
    logits, labels = outputs(12, samples=40, exits=3)
    parts = np.moveaxis(log_softmax(logits, axis=2), 1, 0).copy()
    excluded = np.zeros((40, 5), dtype=bool)
    if excluding:
        excluded[np.arange(40), (labels + 2) % 5] = True
        parts[1][excluded] = 0
    at = np.random.default_rng(0).uniform(0.2, 2, size=8 if biased else 3)
    _, gradient = _geometric_loss(at, parts, labels, excluded)
    for i in range(len(at)):
        step = 1e-6 * np.eye(len(at))[i]
        difference = [_geometric_loss(at + sign * step, parts, labels, excluded)[0] for sign in (1, -1)]
        assert gradient[i] == pytest.approx((difference[0] - difference[1]) / 2e-6, abs=1e-8)


def test_the_fit_of_geometric_meets_the_conditions_of_a_bounded_minimum():
    logits, labels = outputs(13, exits=4)
    logits[:, 1] *= -1  # an exit that is worse than none: its weight is held at 0
    combination = fit_combination("geometric", logits, labels, COSTS)
    parts = np.moveaxis(log_softmax(logits, axis=2), 1, 0).copy()
    held = 0
    for k in range(4):
        values = np.array(combination.weights[k] + combination.biases[k])
        loss, gradient = _geometric_loss(values, parts[: k + 1], labels)
        at_bound = np.append(values[: k + 1] == 0, np.zeros(5, dtype=bool))
        held += at_bound.sum()
        assert np.abs(gradient[~at_bound]).max() < 2e-5 and (gradient[at_bound] > 0).all()
        # The loss is the NLL of what the combination gives, and the ridge.
        ridge = RIDGE * (((values[: k + 1] - 1) ** 2).sum() + (values[k + 1 :] ** 2).sum())
        assert loss == pytest.approx(nll(combination(logits)[:, k], labels) + ridge, rel=1e-10)
    assert held >= 2


def test_with_many_classes_geometric_has_no_biases():
    logits, labels = outputs(14, samples=400, exits=2, classes=201)
    assert fit_combination("geometric", logits, labels, [1, 2]).biases == ()
    logits, labels = outputs(14, samples=400, exits=2, classes=200)
    assert len(fit_combination("geometric", logits, labels, [1, 2]).biases[0]) == 200


# additive


def test_additive_is_the_mixture_of_exits_and_classes():
    logits, _ = outputs(15)
    combination = fitted("additive")
    p, combined = softmax(logits, axis=2), np.exp(combination(logits))
    for k in range(4):
        weights, bias = np.array(combination.weights[k]), np.array(combination.biases[k])
        assert weights.sum() + bias.sum() == pytest.approx(1, abs=1e-12)
        expected = np.einsum("j,njc->nc", weights, p[:, : k + 1]) + bias
        np.testing.assert_allclose(combined[:, k], expected, rtol=1e-12)


@pytest.mark.parametrize("spread", [0.3, 1.5, 8.0])
def test_the_fit_of_additive_meets_the_condition_of_a_mixture(spread):
    # At the optimum each weight is its share of the samples, pseudo-samples included (the fixed point of EM).
    logits, labels = outputs(16, spread=spread)
    combination = fit_combination("additive", logits, labels, COSTS)
    of_label = softmax(logits, axis=2)[np.arange(300), :, labels]
    for k in range(4):
        weights, bias = np.array(combination.weights[k]), np.array(combination.biases[k])
        mixed = of_label[:, : k + 1] @ weights + bias[labels]
        of_exits = (of_label[:, : k + 1] * weights / mixed[:, None]).sum(axis=0)
        of_classes = np.bincount(labels, bias[labels] / mixed, 5)
        np.testing.assert_allclose(weights, (of_exits + 1) / (301 + k + 1), rtol=1e-6)
        np.testing.assert_allclose(bias, (of_classes + 1 / 5) / (301 + k + 1), rtol=1e-6)


def test_an_exit_that_gives_the_right_class_no_chance_is_outweighed_in_a_sum():
    logits, labels = outputs(17, exits=2)
    logits[0, 1, labels[0]] = -np.inf
    for name in ("additive", "mie"):
        combined = fit_combination(name, logits, labels, [1, 2])(logits)
        assert np.isfinite(nll(combined[:, 1], labels))
    with pytest.raises(UserError, match="exit 2 gives a right class probability 0"):
        fit_combination("geometric", logits, labels, [1, 2])
    with pytest.raises(UserError, match="exit 1 gives a right class probability 0"):
        fit_combination("mie", logits[:, ::-1], labels, [1, 2])


@pytest.mark.parametrize("name", ["geometric", "additive", "mie"])
def test_a_fit_lowers_the_loss_of_later_exits_on_other_samples(name):
    logits, labels = outputs(18, samples=4000)
    combined = fit_combination(name, logits[:2000], labels[:2000], COSTS)(logits[2000:])
    for k in range(1, 4):
        assert nll(combined[:, k], labels[2000:]) < nll(log_softmax(logits[2000:, k], axis=1), labels[2000:])


@pytest.mark.parametrize("name", ["geometric", "additive"])
def test_the_order_of_samples_does_not_matter_to_a_fit(name):
    logits, labels = outputs(19)
    order = np.random.default_rng(0).permutation(300)
    one, other = (fit_combination(name, logits[i], labels[i], COSTS) for i in (slice(None), order))
    for a, b in itertools.chain(
        zip(one.weights, other.weights, strict=True), zip(one.biases, other.biases, strict=True)
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


# errors


def test_input_that_makes_no_sense_is_refused_in_one_line():
    logits, labels = outputs(20)
    with pytest.raises(UserError, match="did you mean product"):
        fit_combination("produkt", logits, labels, COSTS)
    with pytest.raises(UserError, match="did you mean mean"):
        Combination("meam", 2)
    for shape in (logits[0], logits[:0], logits[:, :0]):
        with pytest.raises(UserError, match=r"expected \[N, K, C\]"):
            fit_combination("mean", shape, labels, COSTS)
    with pytest.raises(UserError, match="labels"):
        fit_combination("mean", logits, labels + 1, COSTS)
    for costs in (COSTS[:3], [1, 2, 3, 0], [1, 2, 3, math.nan]):
        with pytest.raises(UserError, match="4 positive numbers"):
            fit_combination("mie", logits, labels, costs)
    with pytest.raises(UserError, match=r"expected \[N, 4, C\]"):
        fitted("mean")(logits[:, :3])
    for name in ("geometric", "additive"):
        with pytest.raises(UserError, match="4 classes"):
            fitted(name)(logits[:, :, :4])
    for bad in (math.nan, math.inf):
        broken = logits.copy()
        broken[3, 1, 2] = bad
        for name in COMBINATIONS:
            with pytest.raises(UserError, match="exit 2"):
                fitted(name)(broken)
            if name in ("geometric", "additive", "mie"):
                with pytest.raises(UserError, match="exit 2"):
                    fit_combination(name, broken, labels, COSTS)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "mean", "exits": 0},
        {"name": "mean", "exits": 1, "weights": ((1.0,),)},
        {"name": "mean", "exits": 1, "temperatures": (1.0,)},
        {"name": "product", "exits": 1, "biases": ((1.0,),)},
        {"name": "mie", "exits": 2, "weights": ((1.0,),), "temperatures": (1.0, 1.0)},
        {"name": "mie", "exits": 1, "weights": ((0.0,),), "temperatures": (1.0,)},
        {"name": "mie", "exits": 1, "weights": ((1.0,),)},
        {"name": "mie", "exits": 1, "weights": ((1.0,),), "temperatures": (0.0,)},
        {"name": "geometric", "exits": 2, "weights": ((1.0,), (1.0,))},
        {"name": "geometric", "exits": 1, "weights": ((-1.0,),)},
        {"name": "geometric", "exits": 1, "weights": ((math.nan,),)},
        {"name": "geometric", "exits": 2, "weights": ((1.0,), (1.0, 1.0)), "biases": ((1.0,), (1.0, 2.0))},
        {"name": "geometric", "exits": 1, "weights": ((1.0,),), "biases": ((math.inf,),)},
        {"name": "additive", "exits": 1, "weights": ((1.0,),)},
        {"name": "additive", "exits": 1, "weights": ((1.0,),), "biases": ((0.0,),)},
        {"name": "additive", "exits": 1, "weights": ((1.0,),), "biases": ((),)},
    ],
)
def test_a_combination_with_numbers_missing_or_out_of_range_is_refused(fields):
    with pytest.raises(UserError):
        Combination(**fields)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "mean"}', '{"name": "mean", "exits": "x"}', "null"])
def test_a_text_that_is_no_combination_is_refused(text):
    with pytest.raises(UserError, match="is not a combination"):
        Combination.from_json(text)
