"""Calibration against closed forms, a grid search and bins filled one sample at a time."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitkit.errors import UserError
from exitkit.inference.calibration import (
    HIGHEST,
    LOWEST,
    calibration_error,
    exit_calibration,
    fit_temperatures,
    point_calibration,
)
from exitkit.inference.scores import confidence
from exitkit.inference.thresholds import correct, leave_at


def loop_error(claimed, hits, bins):
    """The definition in words: fill the bins, compare their means."""
    filled = [[] for _ in range(bins)]
    for c, hit in zip(claimed, hits, strict=True):
        filled[next(b for b in range(bins) if c <= (b + 1) / bins)].append((c, hit))
    parts = [len(b) * abs(sum(h for _, h in b) / len(b) - sum(c for c, _ in b) / len(b)) for b in filled if b]
    return sum(parts) / len(claimed)


def outputs(seed, samples=400, exits=3, classes=5, spread=4.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    return spread * (rng.normal(size=(samples, exits, classes)) + np.eye(classes)[labels][:, None]), labels


def likelihood_loss(logits, labels, temperature):
    scaled = logits / temperature
    return -np.mean([z[y] - np.log(np.exp(z).sum()) for z, y in zip(scaled, labels, strict=True)])


def test_the_temperature_of_samples_that_are_alike_has_its_closed_form():
    # sigmoid(a / T) = share that is right, hence T = a / logit(share).
    logits = np.zeros((100, 3, 2))
    logits[:, 0, 0], logits[:, 1, 0], logits[:, 2, 0] = 3.0, 3.0, 0.5
    labels = np.array([0] * 80 + [1] * 20)
    found = fit_temperatures(logits, labels)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.array([3.0, 3.0, 0.5]) / math.log(4), rtol=1e-5)


def test_no_temperature_on_a_fine_grid_is_likelier_than_the_one_found():
    logits, labels = outputs(0)
    for k, temperature in enumerate(fit_temperatures(logits, labels)):
        best = likelihood_loss(logits[:, k], labels, temperature)
        grid = [likelihood_loss(logits[:, k], labels, t) for t in np.geomspace(LOWEST, HIGHEST, 400)]
        assert best <= min(grid) and best < likelihood_loss(logits[:, k], labels, 1.0) - 0.1


def test_the_temperature_that_labels_were_drawn_at_is_found_again():
    rng = np.random.default_rng(3)
    logits, heat = rng.normal(size=(20000, 2, 4)) * 3, np.array([0.5, 2.5])
    # The labels are drawn from one exit's outputs: each exit is a copy of it, as hot as it should be found to be.
    logits[:, 1] = logits[:, 0] * heat[1] / heat[0]
    gumbel = rng.gumbel(size=(20000, 4))
    labels = (logits[:, 0] / heat[0] + gumbel).argmax(1)
    np.testing.assert_allclose(fit_temperatures(logits, labels), heat, rtol=0.04)


@given(st.floats(0.2, 4.0))
def test_logits_times_s_are_s_times_as_hot(s):
    logits, labels = outputs(1, samples=60, exits=1)
    once = fit_temperatures(logits, labels)
    np.testing.assert_allclose(fit_temperatures(logits * s, labels), once * s, rtol=1e-5)


def test_an_exit_that_is_always_right_is_cold_and_one_that_is_always_wrong_is_hot():
    logits = np.tile([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]], (10, 1, 1))
    found = fit_temperatures(logits, np.zeros(10, dtype=int))
    np.testing.assert_allclose(found, [LOWEST, HIGHEST], rtol=1e-4)


def test_huge_logits_and_classes_ruled_out_have_a_temperature_without_a_warning():
    logits = np.zeros((100, 2, 3))
    logits[:, 0] = [3.0, 0.0, -np.inf]
    logits[:, 1] = [3.0, 0.0, -1e308]
    labels = np.array([0] * 80 + [1] * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(fit_temperatures(logits, labels), [3 / math.log(4)] * 2, rtol=1e-5)


def test_fitting_makes_overconfident_outputs_honest():
    logits, labels = outputs(5, samples=3000, spread=8.0)
    val, test = slice(0, 1500), slice(1500, None)
    heat = fit_temperatures(logits[val], labels[val])
    before = exit_calibration(logits[test], labels[test])
    after = exit_calibration(logits[test], labels[test], heat)
    assert (heat > 1).all() and (after < before / 3).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_and_labels_that_make_no_sense_are_refused(bad):
    logits = np.zeros((4, 2, 3))
    logits[1, 1, 2] = bad
    with pytest.raises(UserError, match="exit 2"):
        fit_temperatures(logits, [0, 1, 2, 0])
    for labels in ([0, 1, 2, 3], [0, 1, 2, -1], [0, 1, 2]):
        with pytest.raises(UserError, match="labels"):
            fit_temperatures(np.zeros((4, 2, 3)), labels)
        with pytest.raises(UserError, match="labels"):
            exit_calibration(np.zeros((4, 2, 3)), labels)
    with pytest.raises(UserError, match="probability 0"):
        fit_temperatures(np.array([[[0.0, -np.inf]]]), [1])
    with pytest.raises(UserError, match="no samples"):
        fit_temperatures(np.zeros((0, 2, 3)), [])


def test_a_calibration_error_is_the_one_computed_by_hand():
    # Two bins: (0, 0.5] holds 0.2 and 0.5 (accuracy 1/2, mean 0.35), (0.5, 1] holds 0.6 and 1 (accuracy 1, mean 0.8).
    found = calibration_error([0.2, 0.5, 0.6, 1.0], [True, False, True, True], bins=2)
    assert isinstance(found, float) and found == pytest.approx(0.5 * 0.15 + 0.5 * 0.2)
    assert calibration_error([0.75] * 4, [1, 1, 1, 0]) == 0
    assert calibration_error([1.0, 0.0], [0, 1]) == 1


@given(
    st.integers(1, 100).flatmap(lambda d: st.tuples(st.just(d), st.lists(st.integers(0, d), min_size=1, max_size=40))),
    st.integers(1, 20),
    st.integers(0, 2**32 - 1),
)
def test_a_calibration_error_matches_bins_filled_one_by_one(numbers, bins, seed):
    denominator, numerators = numbers
    hits = np.random.default_rng(seed).random(len(numerators)) < 0.6
    claimed = [n / denominator for n in numerators]
    assert calibration_error(claimed, hits, bins) == pytest.approx(loop_error(claimed, hits, bins), abs=1e-12)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it():
    # 0.07 * 100 rounds above 7. The partner lies inside the bin below: there their errors cancel, and only there.
    assert calibration_error([0.07, 0.065], [0, 0], bins=100) == pytest.approx(0.0675)
    for n in range(1, 100):
        edge, inside = n / 100, (n - 0.5) / 100
        together = abs(1 - edge - inside) / 2
        assert calibration_error([edge, inside], [1, 0], bins=100) == pytest.approx(together)
        assert together < (1 - edge + inside) / 2  # what it would be, were they apart


def test_each_exit_has_the_calibration_error_of_its_own_outputs():
    logits, labels = outputs(7)
    heat = np.array([0.5, 1.0, 3.0])
    for temperatures, cooled in ((None, logits), (heat, logits / heat[:, None])):
        claimed, hits = confidence(cooled), correct(cooled, labels)
        expected = [loop_error(claimed[:, k], hits[:, k], 15) for k in range(3)]
        np.testing.assert_allclose(exit_calibration(logits, labels, temperatures), expected)
    assert not np.allclose(exit_calibration(logits, labels, bins=3), exit_calibration(logits, labels), rtol=1e-3)


def test_an_operating_point_judges_each_sample_where_it_leaves():
    logits, labels = outputs(8)
    claimed, hits = confidence(logits), correct(logits, labels)
    inf = math.inf
    left = leave_at(claimed, [[0.9, 0.8, -inf], [0.5, 0.99, -inf], [-inf, 0, 0], [inf, -inf, 0], [inf, inf, -inf]])
    found = point_calibration(claimed, hits, left, bins=10)
    for p in range(5):
        chosen = [(claimed[n, left[p, n]], hits[n, left[p, n]]) for n in range(len(labels))]
        assert found[p] == pytest.approx(loop_error(*zip(*chosen, strict=True), bins=10))
    np.testing.assert_allclose(found[2:], exit_calibration(logits, labels, bins=10))


def test_what_is_no_probability_or_empty_is_refused():
    for claimed in ([], [np.nan], [1.5], [-0.1]):
        with pytest.raises(UserError):
            calibration_error(claimed, [True] * len(claimed))
    with pytest.raises(UserError, match="0 bins"):
        calibration_error([0.5], [True], bins=0)
    with pytest.raises(UserError, match="no samples"):
        point_calibration(np.empty((0, 2)), np.empty((0, 2), dtype=bool), np.empty((3, 0), dtype=int))
    with pytest.raises(UserError, match="probabilities"):
        point_calibration([[2.0, 3.0]], [[True, True]], [[0]])
