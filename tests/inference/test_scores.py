"""Exit rules against hand-computed scores, sample-by-sample loops and PABEE as its paper words it."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from exitkit.errors import UserError
from exitkit.inference.scores import SCORES, confidence, patience_thresholds, scores
from exitkit.inference.thresholds import correct, leave_at, thresholds

PROBABILITIES = ("confidence", "margin", "entropy")
LOGITS = arrays(np.float64, st.tuples(*[st.integers(1, 5)] * 3), elements=st.floats(-30, 30))


def loop_score(row, rule):
    """One sample at one exit, from its probabilities."""
    weights = [math.exp(z - max(row)) for z in row]
    p = sorted((w / math.fsum(weights) for w in weights), reverse=True)
    if rule == "confidence":
        return p[0]
    if rule == "margin":
        return p[0] - (p[1] if len(p) > 1 else 0)
    entropy = -math.fsum(q * math.log(q) for q in p if q > 0)
    return 1 - entropy / math.log(len(p)) if len(p) > 1 else 1


def pabee(predicted, patience):
    """Exit (0-based) where one sample leaves: as soon as `patience` successive exits agree, else the last."""
    for k in range(len(predicted)):
        if k + 1 >= patience and len(set(predicted[k + 1 - patience : k + 1])) == 1:
            return k
    return len(predicted) - 1


def test_scores_of_known_probabilities_are_those_computed_by_hand():
    logits = np.log([[[1 / 2, 1 / 4, 1 / 4], [0.1, 0.1, 0.8]]]) + 7
    np.testing.assert_allclose(scores(logits, "confidence"), [[0.5, 0.8]])
    np.testing.assert_allclose(scores(logits, "margin"), [[0.25, 0.7]])
    by_hand = [1 - 1.5 * math.log(2) / math.log(3), 1 + (0.8 * math.log(0.8) + 0.2 * math.log(0.1)) / math.log(3)]
    np.testing.assert_allclose(scores(logits, "entropy"), [by_hand])
    np.testing.assert_array_equal(scores(logits, "patience"), [[1, 1]])


@pytest.mark.parametrize("rule", PROBABILITIES)
@given(logits=LOGITS)
def test_scores_match_a_loop_over_samples_and_stay_between_0_and_1(rule, logits):
    found = scores(logits, rule)
    assert found.dtype == np.float64 and (found >= 0).all() and (found <= 1).all()
    np.testing.assert_allclose(found, [[loop_score(row, rule) for row in sample] for sample in logits], atol=1e-12)


def test_confidence_is_that_of_the_evaluation_to_the_last_bit():
    logits = np.random.default_rng(0).normal(size=(300, 3, 10)).astype(np.float32) * 9
    np.testing.assert_array_equal(scores(logits, "confidence"), confidence(logits))


@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=8))
def test_patience_leaves_as_soon_as_t_successive_exits_agree(classes):
    predicted = np.array(classes)
    logits = np.eye(3)[predicted]
    left = leave_at(scores(logits, "patience"), patience_thresholds(4))
    np.testing.assert_array_equal(left, [[pabee(row, t) for row in classes] for t in range(1, 5)])


def test_patience_counts_the_exits_in_a_row_that_say_the_same():
    logits = np.eye(4)[np.array([[1, 1, 1, 2, 2, 1], [0, 3, 3, 3, 3, 3], [0, 1, 0, 1, 0, 1]])]
    np.testing.assert_array_equal(scores(logits, "patience"), [[1, 2, 3, 1, 2, 1], [1, 1, 2, 3, 4, 5], [1] * 6])


def test_patience_thresholds_run_from_the_first_exit_to_the_last():
    inf = math.inf
    np.testing.assert_array_equal(patience_thresholds(3), [[1, 1, -inf], [2, 2, -inf], [3, 3, -inf]])
    np.testing.assert_array_equal(patience_thresholds(1), [[-inf]])
    agreeing = scores(np.eye(2)[np.ones((5, 3), dtype=int)], "patience")
    np.testing.assert_array_equal(leave_at(agreeing, patience_thresholds(3)), [[0] * 5, [1] * 5, [2] * 5])


@pytest.mark.parametrize("rule", SCORES)
def test_temperatures_divide_each_exits_logits(rule):
    logits = np.random.default_rng(1).normal(size=(40, 3, 6)) * 4
    heat = np.array([0.3, 1.0, 5.0])
    found = scores(logits, rule, heat)
    np.testing.assert_allclose(found, scores(logits / heat[:, None], rule), rtol=1e-12)
    if rule == "patience":
        np.testing.assert_array_equal(found, scores(logits, rule))
    else:
        plain = scores(logits, rule)
        assert (found[:, 0] > plain[:, 0]).all() and (found[:, 2] < plain[:, 2]).all()


def test_huge_logits_and_classes_ruled_out_give_the_limits_without_a_warning():
    inf = math.inf
    rows = [[1e308, -1e308, 0], [1e308, 1e308, -inf], [-1e308, -1e308, -1e308], [5, -inf, -inf], [0, -inf, 0]]
    logits = np.array(rows)[:, None]
    half = 1 - math.log(2) / math.log(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for heat in (None, [0.05], [1e-300]):
            np.testing.assert_allclose(scores(logits, "confidence", heat)[:, 0], [1, 0.5, 1 / 3, 1, 0.5])
            np.testing.assert_allclose(scores(logits, "margin", heat)[:, 0], [1, 0, 0, 1, 0])
            np.testing.assert_allclose(scores(logits, "entropy", heat)[:, 0], [1, half, 0, 1, half], atol=1e-15)


def test_a_margin_far_below_the_probabilities_keeps_its_digits():
    gap = 1e-13
    found = scores(np.array([[[gap, 0.0]]]), "margin")[0, 0]
    assert found == pytest.approx(math.tanh(gap / 2), rel=1e-12, abs=0)


def test_one_class_is_always_sure():
    for rule in PROBABILITIES:
        np.testing.assert_array_equal(scores(np.array([[[3.0], [-2.0]]]), rule), [[1, 1]])


def test_with_two_classes_all_probability_rules_send_the_same_samples_to_the_same_exits():
    logits = np.random.default_rng(2).normal(size=(200, 3, 2))
    counts = [[50, 60], [10, 120]]
    left = [leave_at(scores(logits, rule), thresholds(scores(logits, rule), counts)) for rule in PROBABILITIES]
    np.testing.assert_array_equal(left[1], left[0])
    np.testing.assert_array_equal(left[2], left[0])


def test_patience_judges_ties_by_the_class_that_accuracy_judges():
    tied = np.array([[[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    np.testing.assert_array_equal(scores(tied, "patience"), [[1, 2, 1]])
    np.testing.assert_array_equal(correct(tied, [0]), [[True, True, False]])


@pytest.mark.parametrize("rule", SCORES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_refused_by_every_rule(rule, bad):
    logits = np.zeros((4, 2, 3))
    logits[2, 1, 0] = bad
    with pytest.raises(UserError, match="exit 2"):
        scores(logits, rule)
    with pytest.raises(UserError, match="exit 1"):
        scores(np.full((1, 1, 2), -np.inf), rule)


def test_an_unknown_rule_is_refused_with_the_nearest_that_there_is():
    with pytest.raises(UserError, match="unknown exit rule 'confidance'; did you mean confidence"):
        scores(np.zeros((1, 1, 2)), "confidance")


@pytest.mark.parametrize("heat", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, np.nan], [np.inf, 1.0], 1.0])
@pytest.mark.parametrize("rule", SCORES)
def test_temperatures_that_are_not_one_positive_number_an_exit_are_refused(rule, heat):
    with pytest.raises(UserError, match="temperatures"):
        scores(np.zeros((1, 2, 2)), rule, heat)
