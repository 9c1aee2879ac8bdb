"""Pictures of crops: what they show is counted in their pixels."""

import numpy as np
import pytest

from pretrain.data import crop_pictures
from pretrain.data.augmentations import MoCoAugmentation
from pretrain.data.crop_pictures import (
    BARS,
    BINS,
    INVALID,
    KEYS,
    MARGINS,
    SIZE,
    VALID,
    draw_crops,
    draw_histogram,
    draw_small_crops,
    pair_ious,
)
from pretrain.data.crops import share_within
from pretrain.data.multi_crop import MultiCrop


def test_ious_are_of_the_sizes_of_images_and_within_the_limits():
    large, sizes = MoCoAugmentation(1, True), np.array([[48, 64], [30, 30]])
    free, _ = pair_ious(sizes, MultiCrop([large, large]), 400, seed=0)
    assert free.min() < 0.2 and free.max() > 0.7
    assert 0.4 < free.mean() < 0.5
    limited, outside = pair_ious(sizes, MultiCrop([large, large], ious=(0.3, 0.5)), 100, seed=0)
    assert limited.min() >= 0.3 and limited.max() <= 0.5
    assert outside == 0
    of_one_pixel = np.array([[1, 1]])  # whose crops are all the same
    ious, outside = pair_ious(of_one_pixel, MultiCrop([large, large], ious=(0, 0.5)), 20, seed=0)
    assert ious.tolist() == [1.0] * 20 and outside == 20
    again, _ = pair_ious(sizes, MultiCrop([large, large]), 400, seed=0)
    assert np.array_equal(free, again)


def test_bars_are_as_high_as_their_shares():
    """A bin in five has 60 %, one 30 %, the last one 10 %: heights relate alike."""
    ious = np.repeat([0.01, 0.5, 1.0], [60, 30, 10])
    pixels = np.asarray(draw_histogram(ious, "title"))
    blue = (pixels == BARS).all(2)
    left, _, right, _ = MARGINS
    width = (SIZE[0] - left - right) / BINS
    heights = [blue[:, int(left + width * (bar + 0.5))].sum() for bar in range(BINS)]
    assert [bar for bar, height in enumerate(heights) if height > 1] == [0, 12, 24]
    assert heights[12] / heights[0] == pytest.approx(0.5, abs=0.02)
    assert heights[24] / heights[0] == pytest.approx(1 / 6, abs=0.02)


def test_small_crops_are_valid_where_they_lie_within_the_keys():
    rng, count = np.random.default_rng(2), 0
    for _ in range(20):
        key, windows, valid = draw_small_crops(48, 64, rng, 0.2, (0.05, 0.14), 0.5, 8)
        assert valid == [share_within(window, key) >= 0.5 for window in windows]
        count += sum(valid)
    assert 20 < count < 155


def test_frames_are_where_their_crops_are(monkeypatch):
    image = np.full((40, 60, 3), 200, np.uint8)
    windows = [(2, 3, 8, 10), (20, 40, 9, 12)]
    pixels = np.asarray(draw_crops(image, (5, 20, 30, 25), windows, [False, True]))
    for (top, left, height, width), colour in zip(
        [(5, 20, 30, 25), *windows], [KEYS, INVALID, VALID], strict=True
    ):
        rows, columns = np.nonzero((pixels == colour).all(2))
        assert (rows.min(), rows.max() + 1) == (top, top + height)
        assert (columns.min(), columns.max() + 1) == (left, left + width)
    assert pixels[15, 30].tolist() == [200] * 3  # in the key's crop
    assert pixels[38, 5].tolist() == [130] * 3
    monkeypatch.setattr(crop_pictures, "LONGEST", 30)
    assert draw_crops(image, (5, 20, 30, 25), windows, [False, True]).size == (30, 20)
