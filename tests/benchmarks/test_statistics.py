"""Statistics against scipy's own tests and by hand."""

import numpy as np
import pytest
from scipy import stats

from exitkit.benchmarks.report.statistics import area_under_curve, holm, paired_difference, without_outliers


def test_a_paired_difference_is_scipys_paired_test():
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(1, 2, 7), generator.normal(0, 2, 7)
    found, known = paired_difference(ours, theirs, 0.9), stats.ttest_rel(ours, theirs)
    interval = known.confidence_interval(0.9)
    assert found == pytest.approx(((ours - theirs).mean(), interval.low, interval.high, known.pvalue, 7))


def test_what_one_seed_or_seeds_that_agree_exactly_do_not_tell():
    for few in (paired_difference([2.0], [1.5]), paired_difference([97.7, 96.5], [97.2, 96.0])):
        assert few.mean == pytest.approx(0.5) and np.isnan([few.low, few.high, few.p]).all()
    assert paired_difference([2.0, 3.0], [2.0, 3.0]) == (0, 0, 0, 1, 2)


def test_holm_is_its_definition():
    assert holm([0.01, 0.04, 0.03, np.nan]) == pytest.approx([0.03, 0.06, 0.06, np.nan], nan_ok=True)
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0]
    assert holm([]).size == 0


def test_the_area_is_the_mean_height():
    assert area_under_curve([1, 3, 2], [10, 30, 20], 1, 3) == pytest.approx(20)
    assert area_under_curve([1, 2, 3], [10, 20, 30], 1.5, 2.5) == pytest.approx(20)
    assert area_under_curve([1, 1, 2], [5, 10, 20], 1, 2) == pytest.approx(15)
    assert np.isnan(area_under_curve([1, 2], [10, 20], 0.5, 2))


def test_outliers_are_left_out_if_the_axis_is_then_less_than_half_as_long():
    lows, highs = [88.0, 88.2, 88.1, 87.9, 88.3], [91.0, 91.1, 91.2, 90.9, 91.0]
    assert without_outliers([*lows, 43.5], [*highs, 88.0]) == (87.9, 91.2)
    assert without_outliers([*lows, 87.0], [*highs, 91.0]) == (87.0, 91.2)  # an outlier, but little would be gained
    assert without_outliers([*lows, np.nan], [*highs, 130.0]) == (87.9, 91.2)
    assert without_outliers([34, 38, 10], [42, 45, 12]) == (10, 45)  # of few values, none is far from the others
    assert without_outliers([1.0], [1.0]) == (1.0, 1.0)
    assert np.isnan(without_outliers([], [])).all()
    quartiles = np.array([0.0, 1.0, 2.0, 3.0, 4.0, -5.0])  # quartiles 0.25 and 2.75: the fence is at -7.25
    assert without_outliers(quartiles, quartiles) == (-5.0, 4.0)
