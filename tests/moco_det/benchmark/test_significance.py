"""Differences and marks of results made by hand."""

import math

import pytest

from moco_det.benchmark import significance as statistics
from moco_det.benchmark.significance import KnownDeviation, difference_from_published


def test_t_is_students():
    t = pytest.importorskip("scipy.stats").t
    for freedom in (*range(1, 31), 31, 40, 100, 1000):
        assert statistics.t_95(freedom) == pytest.approx(t.ppf(0.975, freedom), abs=0.01)


def test_difference_from_the_paper_by_hand():
    trials = [51.0, 52.0, 53.0, 54.0, 55.0]
    # t of 4 degrees is 2.776; sqrt(2.5) * sqrt(1/5 + 1/5) = 1.
    near = difference_from_published(trials, 55.5, 5)
    assert near.value == -2.5
    assert near.spread == pytest.approx(2.776)
    assert not near.marked
    assert difference_from_published(trials, 55.8, 5).marked
    assert difference_from_published(trials, 50.2, 5).marked


def test_one_trial_is_judged_by_what_is_known_beforehand():
    known = KnownDeviation(sd=0.15, freedom=4)
    # 2.776 * 0.15 * sqrt(1 + 1) = 0.589
    one = difference_from_published([38.0], 38.5, 1, known)
    assert one.spread == pytest.approx(0.589, abs=1e-3)
    assert not one.marked
    assert difference_from_published([37.9], 38.5, 1, known).marked


def test_a_single_trial_of_unknown_deviation_is_never_marked():
    assert difference_from_published([1.0], 99.0, 5) == statistics.Difference(-98.0, None)
    assert not statistics.difference_of_trials([1.0], [99.0]).marked


def test_what_is_known_is_pooled_with_the_trials():
    # Two trials: variance 0.02 with 1 degree; known: 0.04 with 3; pooled (0.12 + 0.02) / 4 = 0.035.
    two = difference_from_published([38.0, 38.2], 38.6, 1, KnownDeviation(0.2, 3))
    assert two.value == pytest.approx(-0.5)
    assert two.spread == pytest.approx(2.776 * math.sqrt(0.035 * 1.5))


def test_difference_of_two_rows_by_hand():
    # Variances 2 and 8, 1 degree each: pooled 5; t of 2 degrees is 4.303; sqrt(5 * (1/2 + 1/2)).
    difference = statistics.difference_of_trials([50.0, 52.0], [40.0, 44.0])
    assert difference.value == 9.0
    assert difference.spread == pytest.approx(4.303 * math.sqrt(5))
    assert not difference.marked
    assert statistics.difference_of_trials([50.0, 52.0], [38.0, 42.0]).marked


def test_nothing_is_compared_with_nothing():
    assert difference_from_published([], 50.0, 5) is None
    assert statistics.difference_of_trials([50.0], []) is None


@pytest.mark.parametrize(
    ("value", "text"), [(1.46, "+1.5"), (-1.46, "−1.5"), (-0.04, "0.0"), (0.04, "0.0")]
)
def test_signs(value, text):
    assert statistics.signed(value) == text
