"""J and F: by hand, by a boundary measure that looks at every pair of pixels, and as the official
davis2017-evaluation has recorded them (tests/golden/record_davis_measures.py)."""

import math

import numpy as np
import pytest
import yaml
from record_davis_measures import FILE, drawn_masks

from pretrain.evaluation.region_measures import boundary, boundary_f, jaccard, measure_frame

RECORDED = yaml.safe_load(FILE.read_text())


def square(top, left, side=2, size=(40, 60)):
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_j_by_hand():
    empty = np.zeros((40, 60), bool)
    assert jaccard(square(3, 3), square(3, 4)) == 2 / 6
    assert jaccard(square(3, 3), square(3, 3)) == 1
    assert jaccard(square(3, 3), square(9, 9)) == jaccard(empty, square(9, 9)) == 0
    assert jaccard(empty, empty) == 1


def test_a_boundary_by_hand():
    found = boundary(square(1, 1, size=(5, 5)))
    assert np.argwhere(found).tolist() == [
        *([0, 0], [0, 1], [0, 2]),
        *([1, 0], [1, 2]),
        *([2, 0], [2, 1], [2, 2]),
    ]
    # A mask that reaches the border has no boundary there.
    assert np.argwhere(boundary(square(3, 3, size=(5, 5)))).tolist() == [
        *([2, 2], [2, 3], [2, 4]),
        *([3, 2], [4, 2]),
    ]


def test_f_by_hand():
    """Of 40 x 60 pixels 0.8 % of the diagonal are 0.6, rounded up to 1."""
    empty, full = np.zeros((40, 60), bool), np.ones((40, 60), bool)
    assert boundary_f(square(9, 9), square(9, 10)) == 1  # each is within 1 of the other
    assert boundary_f(square(9, 9), square(30, 30)) == 0
    assert boundary_f(square(9, 9), empty) == boundary_f(empty, square(9, 9)) == 0
    assert boundary_f(empty, empty) == boundary_f(full, empty) == 1  # neither has a boundary
    # A right one and a wrong one of the same shape: precision 1/2, recall 1.
    both = square(9, 9) | square(30, 30)
    assert boundary_f(both, square(9, 9)) == pytest.approx(2 / 3)
    assert boundary_f(square(9, 9), both) == pytest.approx(2 / 3)


@pytest.mark.parametrize("size", [(24, 33), (160, 200)], ids=["1-pixel", "3-pixels"])
def test_f_is_that_of_all_pairs_of_pixels(size):
    rng = np.random.default_rng(0)
    masks = []
    for _ in range(2):
        mask = np.zeros(size, bool)
        for _ in range(5):
            top, left = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
            mask[top : top + rng.integers(2, 30), left : left + rng.integers(2, 30)] = True
        masks.append(mask)
    tolerance = math.ceil(0.008 * math.sqrt(size[0] ** 2 + size[1] ** 2))
    edges = [np.argwhere(slow_boundary(mask)) for mask in masks]
    distances = np.sqrt(((edges[0][:, None] - edges[1][None]) ** 2).sum(axis=2))
    precision, recall = ((distances.min(axis=a) <= tolerance).mean() for a in (1, 0))
    expected = 2 * precision * recall / (precision + recall)
    assert 0 < expected < 1
    assert boundary_f(*masks) == pytest.approx(expected, abs=1e-12)


def slow_boundary(mask):
    height, width = mask.shape
    found = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            others = ((y + 1, x), (y, x + 1), (y + 1, x + 1))
            inside = [(min(v, height - 1), min(u, width - 1)) for v, u in others]
            found[y, x] = any(mask[place] != mask[y, x] for place in inside)
    return found


@pytest.mark.parametrize("name", drawn_masks())
def test_measures_are_the_official_ones(name):
    true, found = drawn_masks()[name]
    frames = [measure_frame(*pair, 3) for pair in zip(found[1:-1], true[1:-1], strict=True)]
    expected = [[RECORDED[m][f"{name}_{number}"] for m in "JF"] for number in (1, 2, 3)]
    np.testing.assert_allclose(np.mean(frames, axis=0), expected, rtol=0, atol=1e-12)
