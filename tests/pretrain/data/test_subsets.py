"""Subsets: their counts by the formula, and which images they are."""

import numpy as np
import pytest

from moco_det.common.errors import UserError
from pretrain.data.subsets import long_tailed_sizes, long_tailed_subset, random_subset


def imagenet(rng) -> np.ndarray:
    """1,281,167 images of 1000 classes, 895 of them with 1300, the others with 732 and more."""
    sizes = np.full(1000, 1300)
    sizes[:105] = np.round(732 + 567 * np.linspace(0, 1, 105) ** 0.459)
    sizes[50] += 1_281_167 - sizes.sum()
    assert (sizes.sum(), sizes.min(), sizes.max()) == (1_281_167, 732, 1300)
    return rng.permutation(sizes)


@pytest.mark.parametrize("seed", range(3))
def test_imagenets_long_tail_has_the_papers_118k_images(seed):
    sizes = long_tailed_sizes(imagenet(np.random.default_rng(seed)), alpha=6)
    assert sizes.sum() == pytest.approx(118_000, rel=0.015)
    assert 1000 < sizes.max() <= 1300 and sizes.min() == 5  # ImageNet-LT: 1280 and 5
    assert 110_000 < long_tailed_sizes(np.full(1000, 1280), 6).sum() < 120_000


def test_sizes_are_quantiles_of_numpys_pareto():
    sizes = long_tailed_sizes(np.full(1000, 10**6), alpha=6) / 10**6
    drawn = np.random.default_rng(0).pareto(6, 10**6)
    top = np.quantile(drawn, 0.999)
    for rank in (10, 100, 300, 500, 800):
        assert sizes[rank - 1] == pytest.approx(np.quantile(drawn, 1 - rank / 1000) / top, rel=0.05)
    assert (np.diff(sizes) <= 0).all()


@pytest.mark.parametrize("total", [60, 118, 500, 999, 1000])
def test_a_long_tail_of_so_many_images(total):
    available = np.array([90, 130, 80, 120, 100, 110, 170, 50, 145, 5])
    sizes = long_tailed_sizes(available, 6, total)
    assert sizes.sum() == total
    assert (sizes <= available).all() and (sizes >= 5).all()


@pytest.mark.parametrize("total", [49, 1001])
def test_a_long_tail_that_there_is_not(total):
    available = np.array([90, 130, 80, 120, 100, 110, 170, 50, 145, 5])
    with pytest.raises(UserError, match=f"--long-tailed {total}: 10 classes.* have 50 to 1000"):
        long_tailed_sizes(available, 6, total)


def test_the_images_of_a_long_tail_are_drawn_by_the_seed():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 60))
    taken = long_tailed_subset(labels, 6, seed=1)
    assert (np.diff(taken) > 0).all()
    found = np.bincount(labels[taken])
    assert sorted(found.tolist(), reverse=True) == long_tailed_sizes(np.full(20, 60), 6).tolist()
    assert (np.sort(found)[::-1] != found).any()  # the head is not the first class
    assert np.array_equal(taken, long_tailed_subset(labels, 6, seed=1))
    assert not np.array_equal(taken, long_tailed_subset(labels, 6, seed=2))
    assert len(long_tailed_subset(labels, 6, seed=1, total=400)) == 400


def test_random_images_are_each_as_likely():
    counts = np.zeros(20)
    for seed in range(500):
        taken = random_subset(20, 5, seed)
        assert len(set(taken.tolist())) == 5 and (np.diff(taken) > 0).all()
        counts[taken] += 1
    assert np.abs(counts - 125).max() < 45  # 4 standard deviations
    with pytest.raises(UserError, match="--random 21: there are 20 images"):
        random_subset(20, 21, 0)
