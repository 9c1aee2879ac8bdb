"""Both augmentations as distributions, against the official code's Compose of torchvision.

`OFFICIAL` is what facebookresearch/moco's main_moco.py runs, built of torchvision's own operations.
Each comparison has a fixed seed; were the seeds drawn, one in a million would fail by chance
(`FALSE_ALARM`), for each value that is compared.
"""

import collections
import math
import random

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as TF

from pretrain.data import augmentations

FALSE_ALARM = 1e-6
DRAWS = 3000
SIZE = 8


class GaussianBlur:
    """As the official moco/loader.py blurs: by PIL, sigma uniform."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


OFFICIAL = {
    "v1": lambda size: [
        transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
        transforms.RandomGrayscale(p=0.2),
        transforms.ColorJitter(0.4, 0.4, 0.4, 0.4),
        transforms.RandomHorizontalFlip(),
    ],
    "v2": lambda size: [
        transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([GaussianBlur()], p=0.5),
        transforms.RandomHorizontalFlip(),
    ],
}
RECIPES = sorted(OFFICIAL)

# Our name of an operation, and torchvision's; the blur is PIL's and is recorded apart.
OPERATIONS = {
    "resized_crop": "resized_crop",
    "adjust_brightness": "adjust_brightness",
    "adjust_contrast": "adjust_contrast",
    "adjust_saturation": "adjust_saturation",
    "adjust_hue": "adjust_hue",
    "to_grayscale": "rgb_to_grayscale",
    "horizontal_flip": "hflip",
}


@pytest.fixture
def record(monkeypatch):
    """Function: recipe -> (our views, official views), each a list of [(operation, arguments)].

    The operations note their calls and hand on the image as it is.
    """
    calls: list[tuple[str, tuple]] = []

    def noting(name):
        def operation(image, *arguments, **_):
            keep = 0 if name == "to_grayscale" else 4 if name == "resized_crop" else 1
            calls.append((name, tuple(float(value) for value in arguments[:keep])))
            return image

        return operation

    for ours, theirs in OPERATIONS.items():
        monkeypatch.setattr(augmentations, ours, noting(ours))
        monkeypatch.setattr(TF, theirs, noting(ours))
    monkeypatch.setattr(augmentations, "gaussian_blur", noting("gaussian_blur"))
    blur = noting("gaussian_blur")
    monkeypatch.setattr(
        Image.Image, "filter", lambda image, kernel: blur(image, kernel.radius), raising=True
    )

    def views(transform, image, argument) -> list[list[tuple[str, tuple]]]:
        taken = []
        for _ in range(DRAWS):
            transform(image, *argument)
            taken.append(calls.copy())
            calls.clear()
        return taken

    def both(recipe):
        random.seed(0)
        torch.manual_seed(0)
        pixels = np.zeros((300, 400, 3), np.uint8)
        ours = augmentations.MoCoAugmentation(SIZE, aug_plus=recipe == "v2")
        official = transforms.Compose(OFFICIAL[recipe](SIZE))
        return (
            views(ours, pixels, [np.random.default_rng(0)]),
            views(official, Image.fromarray(pixels), []),
        )

    return both


def assert_same_frequencies(ours: collections.Counter, theirs: collections.Counter):
    """Two samples of one distribution over names; chi-square, rare names taken together."""
    names = sorted(ours.keys() | theirs.keys())
    table = np.array([[counts[name] for name in names] for counts in (ours, theirs)], float)
    rare = table.sum(0) < 10
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)])
    table = table[:, table.sum(0) > 0]
    if table.shape[1] > 1:
        assert stats.chi2_contingency(table).pvalue > FALSE_ALARM


@pytest.mark.parametrize("recipe", RECIPES)
def test_operations_come_in_the_official_order_and_as_often(record, recipe):
    """The sequences of operations, the orders of the colour jitter among them."""
    ours, theirs = (
        collections.Counter(tuple(name for name, _ in view) for view in views)
        for views in record(recipe)
    )
    # Each has one probability in both; what is possible there only, or here only, stands out.
    assert_same_frequencies(ours, theirs)
    orders = {tuple(n for n in view if n.startswith("adjust")) for view in ours} - {()}
    assert len(orders) == math.factorial(4)
    possible = {tuple(n for n in view if not n.startswith("adjust")) for view in theirs}
    assert {tuple(n for n in view if not n.startswith("adjust")) for view in ours} == possible


@pytest.mark.parametrize("recipe", RECIPES)
def test_arguments_are_distributed_as_the_official_ones(record, recipe):
    """Every argument of every operation: Kolmogorov and Smirnov's test of two samples."""
    ours, theirs = (
        {
            name: np.array([values for view in views for called, values in view if called == name])
            for name in [*OPERATIONS, "gaussian_blur"]
        }
        for views in record(recipe)
    )
    for name, expected in theirs.items():
        assert len(expected) == 0 or ours[name].shape[1:] == expected.shape[1:], name
        for column in range(expected.shape[1] if expected.ndim > 1 else 0):
            found, wanted = ours[name][:, column], expected[:, column]
            assert stats.ks_2samp(found, wanted).pvalue > FALSE_ALARM, (name, column)
            if name != "resized_crop":
                assert_same_ends(found, wanted, (name, column))
    # Of a crop, the area is drawn; the largest seldom fit, so only its lower end is sharp.
    smallest = [
        crops["resized_crop"][:, 2:].prod(1).min() / (300 * 400) for crops in (ours, theirs)
    ]
    assert smallest == pytest.approx([0.2, 0.2], abs=20 / DRAWS)


def assert_same_ends(found: np.ndarray, wanted: np.ndarray, what):
    """Two samples of a uniform distribution: its range, which tests of the whole see late.

    A sample of n ends more than 20/n of the range before it once in 10^8.
    """
    ends = [found.min() - wanted.min(), found.max() - wanted.max()]
    allowed = 20 / min(len(found), len(wanted)) * (wanted.max() - wanted.min())
    assert np.abs(ends).max() <= allowed, what


def statistics(view: np.ndarray) -> list[float]:
    """Numbers of one view that the operations change: colour, contrast, saturation, sharpness."""
    grey = cv2.cvtColor(view, cv2.COLOR_RGB2GRAY).astype(np.float32)
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV)
    halves = np.array_split(grey.mean(0), 2)
    return [
        *view.mean((0, 1)),
        grey.std(),
        hsv[..., 1].mean(),
        cv2.Laplacian(grey, cv2.CV_32F).std(),
        halves[0].mean() - halves[1].mean(),
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_views_of_photographs_are_distributed_as_the_official_ones(shared_data, recipe):
    """Pixels, not calls: 50 views of each of 12 photographs, Kolmogorov and Smirnov's test."""
    paths = sorted(shared_data("voc2012_40").glob("VOC2012/JPEGImages/*.jpg"))[:12]
    ours = augmentations.MoCoAugmentation(48, aug_plus=recipe == "v2")
    official = transforms.Compose(OFFICIAL[recipe](48))
    rng = np.random.default_rng(1)
    random.seed(1)
    torch.manual_seed(1)
    found, wanted = [], []
    for path in paths:
        image = Image.open(path).convert("RGB")
        pixels = np.array(image)
        found += [statistics(ours(pixels, rng)) for _ in range(50)]
        wanted += [statistics(np.array(official(image))) for _ in range(50)]
    for ours_, theirs in zip(np.transpose(found), np.transpose(wanted), strict=True):
        assert stats.ks_2samp(ours_, theirs).pvalue > FALSE_ALARM
