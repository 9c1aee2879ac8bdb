"""Means, deviations and differences of results, by hand."""

import math

import pytest

from moco_det.benchmark import significance
from moco_det.benchmark.significance import KnownDeviation, Summary, difference_from_published


def test_mean_and_sample_deviation_by_hand():
    summary = Summary.of([50.0, 54.0, 55.0])
    assert summary.mean == 53.0
    assert summary.sd == pytest.approx((14 / 2) ** 0.5)  # 9 + 1 + 4 over n - 1
    assert summary.n == 3
    assert summary.text() == "53.0 ± 2.6"
    assert summary.text(2) == "53.00 ± 2.65"


def test_one_trial_has_no_deviation():
    assert Summary.of([7.25]) == Summary(7.25, None, 1)
    assert Summary.of([7.25]).text() == "7.2"


def test_t_is_students():
    t = pytest.importorskip("scipy.stats").t
    for degrees in (*range(1, 31), 31, 40, 100, 1000):
        assert significance.t_95(degrees) == pytest.approx(t.ppf(0.975, degrees), abs=0.01)


def test_difference_from_the_paper_by_hand():
    trials = [51.0, 52.0, 53.0, 54.0, 55.0]
    # t of 4 degrees is 2.776; sqrt(2.5) * sqrt(1/5 + 1/5) = 1.
    near = difference_from_published(trials, 55.5, 5)
    assert near.value == -2.5
    assert near.margin == pytest.approx(2.776)
    assert not near.significant
    assert difference_from_published(trials, 55.8, 5).significant
    assert difference_from_published(trials, 50.2, 5).significant


def test_one_trial_is_judged_by_what_is_known_beforehand():
    known = KnownDeviation(sd=0.15, degrees_of_freedom=4)
    # 2.776 * 0.15 * sqrt(1 + 1) = 0.589
    one = difference_from_published([38.0], 38.5, 1, known)
    assert one.margin == pytest.approx(0.589, abs=1e-3)
    assert not one.significant
    assert difference_from_published([37.9], 38.5, 1, known).significant


def test_a_single_trial_of_unknown_deviation_is_never_significant():
    assert difference_from_published([1.0], 99.0, 5) == significance.Difference(-98.0, None)
    assert not significance.difference_of_trials([1.0], [99.0]).significant


def test_what_is_known_is_pooled_with_the_trials():
    # Two trials: variance 0.02 with 1 degree; known: 0.04 with 3; pooled (0.12 + 0.02) / 4 = 0.035.
    two = difference_from_published([38.0, 38.2], 38.6, 1, KnownDeviation(0.2, 3))
    assert two.value == pytest.approx(-0.5)
    assert two.margin == pytest.approx(2.776 * math.sqrt(0.035 * 1.5))


def test_difference_of_two_rows_by_hand():
    # Variances 2 and 8, 1 degree each: pooled 5; t of 2 degrees is 4.303; sqrt(5 * (1/2 + 1/2)).
    difference = significance.difference_of_trials([50.0, 52.0], [40.0, 44.0])
    assert difference.value == 9.0
    assert difference.margin == pytest.approx(4.303 * math.sqrt(5))
    assert not difference.significant
    assert significance.difference_of_trials([50.0, 52.0], [38.0, 42.0]).significant


def test_nothing_is_compared_with_nothing():
    assert difference_from_published([], 50.0, 5) is None
    assert significance.difference_of_trials([50.0], []) is None


@pytest.mark.parametrize(
    ("value", "text"), [(1.46, "+1.5"), (-1.46, "−1.5"), (-0.04, "0.0"), (0.04, "0.0")]
)
def test_signs(value, text):
    assert significance.signed(value) == text
