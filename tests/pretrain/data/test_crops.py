"""Windows: what they overlap is counted pixel by pixel."""

import numpy as np
import pytest

from pretrain.data import crops
from pretrain.data.crops import draw_crop, draw_crop_within, draw_pair, iou, share_within


def mask(window, height: int = 40, width: int = 50) -> np.ndarray:
    top, left, h, w = window
    pixels = np.zeros((height, width), bool)
    pixels[top : top + h, left : left + w] = True
    return pixels


def test_overlap_is_what_the_pixels_say():
    rng = np.random.default_rng(0)
    pairs = [[draw_crop(40, 50, rng, 0.05, 0.5) for _ in range(2)] for _ in range(60)]
    expected = []
    for one, other in pairs:
        a, b = mask(one), mask(other)
        expected.append((a & b).sum() / (a | b).sum())
        assert iou(one, other) == iou(other, one) == pytest.approx(expected[-1])
        assert share_within(one, other) == pytest.approx((a & b).sum() / a.sum())
    assert 0 < np.count_nonzero(expected) < 60
    first, second = np.array(pairs).transpose(1, 2, 0)  # 4 x 60 each
    np.testing.assert_allclose(iou(first, second), expected)


def test_windows_that_touch_or_hold_one_another():
    assert iou((0, 0, 10, 10), (10, 0, 5, 10)) == 0
    assert share_within((2, 2, 5, 5), (0, 0, 10, 10)) == 1
    assert share_within((0, 0, 10, 10), (2, 2, 5, 5)) == 0.25
    assert iou((3, 4, 5, 6), (3, 4, 5, 6)) == 1


@pytest.mark.parametrize(
    ("share", "draws", "most"), [(0.1, 10_000, 0.001), (0.5, 1000, 0.01), (1.0, 1000, 0.15)]
)
def test_a_constrained_crop_overlaps_unless_its_tries_ran_out(share, draws, most, capsys):
    rng, failed = np.random.default_rng(1), 0
    for _ in range(draws):
        anchor = draw_crop(480, 640, rng)
        window, free = draw_crop_within(480, 640, rng, 0.05, 0.14, anchor, share)
        failed += free
        assert free or share_within(window, anchor) >= share
        top, left, h, w = window
        assert top >= 0 and left >= 0 and top + h <= 480 and left + w <= 640
        assert 0.045 < h * w / (480 * 640) < 0.145
    with capsys.disabled():
        print(f"\n--constrained {share}: {failed} of {draws} crops are free", end=" ")
    assert failed / draws < most


def test_a_crop_that_cannot_overlap_is_free_after_ten_tries(monkeypatch):
    drawn, tries = [], crops._tries

    def counted(*arguments):
        for window in tries(*arguments):
            drawn.append(window)
            yield window

    monkeypatch.setattr(crops, "_tries", counted)
    anchor = 0, 0, 5, 5  # 10 % of the crop's area would be more
    window, free = draw_crop_within(480, 640, np.random.default_rng(0), 0.05, 0.14, anchor, 0.1)
    assert free
    assert len(drawn) == 10 + 1
    assert window == drawn[-1]


@pytest.mark.parametrize("ious", [(0.0, 0.1), (0.3, 0.4), (0.8, 1.0), (0.0, 0.0)])
def test_the_iou_of_a_pair_is_within_its_limits(ious):
    rng = np.random.default_rng(2)
    pairs = [draw_pair(480, 640, rng, 0.2, 1.0, ious) for _ in range(100)]
    for first, second in pairs:
        assert ious[0] <= iou(first, second) <= ious[1]
        for top, left, h, w in (first, second):
            assert top >= 0 and left >= 0 and top + h <= 480 and left + w <= 640
            assert 0.19 < h * w / (480 * 640) <= 1
            assert 0.74 < w / h < 1.35
    assert len(set(pairs)) == 100


def test_a_pair_is_what_free_crops_are_under_the_condition():
    """Rejection, one pair after the other: means of the two windows' areas and of their IoU."""
    rng, rejected = np.random.default_rng(3), []
    while len(rejected) < 400:
        pair = draw_crop(300, 400, rng), draw_crop(300, 400, rng)
        if iou(*pair) <= 0.3:
            rejected.append(pair)
    ours = [draw_pair(300, 400, rng, 0.2, 1.0, (0.0, 0.3)) for _ in range(400)]

    def measures(pairs):
        first, second = np.array(pairs, float).transpose(1, 2, 0)
        area = 300 * 400
        return np.array([(w[2] * w[3] / area).mean() for w in (first, second)] + [
            iou(first, second).mean()
        ])  # fmt: skip

    assert np.abs(measures(ours) - measures(rejected)).max() < 0.03  # standard errors below 0.01


def test_a_pair_that_cannot_be_met_is_given_up():
    """No window of 20 % of a strip has a ratio within [3/4, 4/3]; no two of 60 % are disjoint."""
    rng = np.random.default_rng(0)
    assert draw_pair(10, 1000, rng, 0.2, 1.0, (0.0, 0.5)) is None
    assert draw_pair(300, 400, rng, 0.6, 1.0, (0.0, 0.0)) is None
