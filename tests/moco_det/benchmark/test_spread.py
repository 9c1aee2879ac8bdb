"""Means and deviations by hand."""

import pytest

from moco_det.benchmark.significance import Spread


def test_mean_and_sample_deviation_by_hand():
    spread = Spread.of([50.0, 54.0, 55.0])
    assert spread.mean == 53.0
    assert spread.deviation == pytest.approx((14 / 2) ** 0.5)  # 9 + 1 + 4 over n - 1
    assert spread.n == 3
    assert spread.text() == "53.0 ± 2.6"
    assert spread.text(2) == "53.00 ± 2.65"


def test_one_trial_has_no_deviation():
    assert Spread.of([7.25]) == Spread(7.25, None, 1)
    assert Spread.of([7.25]).text() == "7.2"
