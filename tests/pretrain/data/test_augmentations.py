"""The OpenCV views against torchvision's PIL operations, with the same parameters."""

import numpy as np
import pytest
import torch
from photographs import synthetic_photograph
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import functional as TF

from pretrain.data import augmentations as views

TOLERANCE = 2.0  # grey levels of 255, mean absolute difference


@pytest.fixture(params=["synthetic", "photographs"])
def images(request, shared_data) -> list[np.ndarray]:
    if request.param == "synthetic":
        return [synthetic_photograph()]
    paths = sorted(shared_data("voc2012_40").glob("VOC2012/JPEGImages/*.jpg"))[:12]
    return [np.array(Image.open(path).convert("RGB")) for path in paths]


def difference(ours: np.ndarray, pil: Image.Image) -> float:
    return float(np.abs(ours.astype(float) - np.asarray(pil, dtype=float)).mean())


FACTORS = [0.6, 0.85, 1.0, 1.4]


@pytest.mark.parametrize(
    ("ours", "oracle", "amounts"),
    [
        (views.adjust_brightness, TF.adjust_brightness, FACTORS),
        (views.adjust_contrast, TF.adjust_contrast, FACTORS),
        (views.adjust_saturation, TF.adjust_saturation, FACTORS),
        (views.adjust_hue, TF.adjust_hue, [-0.4, -0.1, 0.0, 0.07, 0.4]),
        (
            views.gaussian_blur,
            lambda image, sigma: image.filter(ImageFilter.GaussianBlur(radius=sigma)),
            [0.1, 0.5, 1.0, 2.0],
        ),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "blur"],
)
def test_operation_follows_pil(images, ours, oracle, amounts):
    for image in images:
        for amount in amounts:
            assert (
                difference(ours(image, amount), oracle(Image.fromarray(image), amount)) < TOLERANCE
            )


def test_grayscale_and_flip_follow_pil(images):
    for image in images:
        pil = Image.fromarray(image)
        assert difference(views.to_grayscale(image), TF.to_grayscale(pil, 3)) < TOLERANCE
        assert difference(views.horizontal_flip(image), TF.hflip(pil)) == 0


@pytest.mark.parametrize("size", [32, 64, 224])
def test_resized_crop_follows_pil(images, size):
    rng = np.random.default_rng(1)
    for image in images:
        for _ in range(8):
            window = views.draw_crop(*image.shape[:2], rng)
            oracle = TF.resized_crop(Image.fromarray(image), *window, [size, size])
            assert difference(views.resized_crop(image, *window, size), oracle) < TOLERANCE


def test_evaluation_view_follows_pil(images):
    oracle = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    for image in images:
        ours = views.resize_and_center_crop(image, 224)
        assert difference(ours, oracle(Image.fromarray(image))) < TOLERANCE


def test_evaluation_view_leaves_an_image_of_the_right_size_alone():
    image = synthetic_photograph()[:32, :32]
    assert np.array_equal(views.resize_and_center_crop(image, 32), image)


@pytest.mark.parametrize("least", [0.2, 0.08])
def test_crops_are_distributed_as_torchvision_draws_them(least):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    blank = torch.zeros(3, 300, 400)
    ours = np.array([views.draw_crop(300, 400, rng, least) for _ in range(4000)], float)
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(blank, (least, 1.0), (3 / 4, 4 / 3))
            for _ in range(4000)
        ],
        float,
    )
    # Means of top, left, height and width: standard errors are below 1.5 pixels.
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 6
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 6


def test_a_view_is_of_a_crop_of_the_least_area(monkeypatch):
    seen = []

    def drawn(height, width, rng, least, most):
        seen.append(least)
        return 0, 0, 8, 8

    monkeypatch.setattr(views, "draw_crop", drawn)
    image = np.zeros((16, 16, 3), np.uint8)
    views.MoCoAugmentation(8, False)(image, np.random.default_rng(0))
    views.MoCoAugmentation(8, True, crop_min=0.08)(image, np.random.default_rng(0))
    assert seen == [0.2, 0.08]


def test_a_crop_that_never_fits_falls_back_to_the_central_window():
    # 10 x 1000: no window of 20 % of the area has a ratio within [3/4, 4/3].
    window = views.draw_crop(10, 1000, np.random.default_rng(0))
    assert window == (0, 493, 10, 13)


@pytest.mark.parametrize("aug_plus", [False, True])
def test_a_view_depends_on_its_generator_alone(aug_plus):
    view, image = views.MoCoAugmentation(64, aug_plus), synthetic_photograph()
    before = image.copy()
    one = view(image, np.random.default_rng(5))
    two = view(image, np.random.default_rng(5))
    other = view(image, np.random.default_rng(6))
    assert one.shape == (64, 64, 3)
    assert one.dtype == np.uint8
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(("strength", "hue"), [(0.5, 0.1), (1.0, 0.2)])
def test_color_strength_is_simclrs(monkeypatch, strength, hue):
    """SimCLR's jitter is (0.8 s, 0.8 s, 0.8 s, 0.2 s), MoCo v2's that of s = 1/2."""
    seen = set()

    def jitter(*amounts):
        seen.add(amounts[:-1])  # the last argument is the generator
        return views.Look()

    monkeypatch.setattr(views, "draw_jitter", jitter)
    view = views.MoCoAugmentation(8, aug_plus=True, color_strength=strength)
    for seed in range(5):
        view(synthetic_photograph(), np.random.default_rng(seed))
    assert seen == {(0.8 * strength, hue)}


def test_v2_applies_its_operations_as_often_as_the_paper_says(monkeypatch):
    calls = {"color_jitter": 0, "to_grayscale": 0, "gaussian_blur": 0, "horizontal_flip": 0}

    def counting(name):
        def operation(image, *_):
            calls[name] += 1
            return image

        return operation

    for name in calls:
        monkeypatch.setattr(views, name, counting(name))
    rng, view, image = (
        np.random.default_rng(0),
        views.MoCoAugmentation(8, True),
        synthetic_photograph(),
    )
    for _ in range(2000):
        view(image, rng)
    shares = {name: count / 2000 for name, count in calls.items()}
    wanted = {
        "color_jitter": 0.8,
        "to_grayscale": 0.2,
        "gaussian_blur": 0.5,
        "horizontal_flip": 0.5,
    }
    for name, share in wanted.items():
        assert shares[name] == pytest.approx(share, abs=0.04)  # 3.5 standard errors
