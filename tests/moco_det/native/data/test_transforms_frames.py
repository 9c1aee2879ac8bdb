"""Draws for models of pixels: scales of a choice, and frames of fixed size."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from moco_det.config.loading import get_cfg
from moco_det.native.data.mapper import build_semantic_mapper, build_test_mapper, build_train_mapper
from moco_det.native.data.transforms import FixedSize, RandomFrame, ScaleChoice
from moco_det.native.modeling.pixel_input import Frame


def test_each_scale_is_drawn_as_often_as_the_others():
    rng, scales = np.random.default_rng(0), ScaleChoice((0.5, 1.0, 2.0), flip=True)
    drawn = [scales.draw(rng, 10, 20) for _ in range(900)]
    count = Counter(transform.new for transform in drawn)
    assert count.keys() == {(5, 10), (10, 20), (20, 40)}
    assert min(count.values()) > 240  # 4 deviations below 300
    assert np.mean([t.flip for t in drawn]) == pytest.approx(0.5, abs=0.07)
    assert ScaleChoice((0.5,), (8, 8)).draw(rng, 10, 20).new == (8, 16)


def test_zoom_and_angle_are_uniform_within_their_limits():
    rng = np.random.default_rng(0)
    frames = RandomFrame((32, 48), (1, 2, 3), scale=(0.75, 1.25), rotation=5.0, flip=True)
    drawn = [frames.draw(rng, 10, 20) for _ in range(1000)]
    assert {(t.frame.old, t.frame.new, t.fill) for t in drawn} == {((10, 20), (32, 48), (1, 2, 3))}
    for values, low, high in (
        ([t.frame.zoom for t in drawn], 0.75, 1.25),
        ([t.frame.angle for t in drawn], -5, 5),
    ):
        assert low <= min(values) < max(values) <= high
        quartiles = np.quantile(values, [0.25, 0.5, 0.75])
        assert quartiles == pytest.approx(np.linspace(low, high, 5)[1:4], abs=0.08 * (high - low))
    assert np.mean([t.flip for t in drawn]) == pytest.approx(0.5, abs=0.06)
    zooms = {
        RandomFrame((8, 8), (0,) * 3, choices=(1.0, 1.5)).draw(rng, 8, 8).frame for _ in range(50)
    }
    assert zooms == {Frame((8, 8), (8, 8), 1.0), Frame((8, 8), (8, 8), 1.5)}


def test_image_and_maps_are_moved_and_flipped_alike():
    """A picture whose red is its label, and a thousandth of its depth."""
    values = np.zeros((20, 30), np.uint8)
    values[4:12, 3:18] = 200
    image = Image.fromarray(np.stack([values, 0 * values, 0 * values], axis=2))
    rng = np.random.default_rng(3)
    frames = RandomFrame((40, 40), (0, 0, 0), choices=(1.5,), rotation=20.0, flip=True)
    for _ in range(6):
        transform = frames.draw(rng, 20, 30)
        pixels, bgr = transform.apply_image(image), transform.apply_image(image, "BGR")
        labels = transform.apply_segmentation(values)
        depths = transform.apply_depth(values.astype(np.float32))
        assert pixels.shape == (3, 40, 40)
        assert np.array_equal(bgr, pixels[::-1])
        assert pixels.flags.c_contiguous and labels.flags.c_contiguous and depths.flags.c_contiguous
        assert np.array_equal(depths > 0, labels == 200)
        assert depths.max() == pytest.approx(200 / 1.5)
        inside = labels == 200
        assert ((pixels[0] > 100) != inside).mean() < 0.06  # edges of a bilinear image are soft
        assert 0.1 < inside.mean() < 0.9


def make_cfg(*options):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.merge_from_list(list(options))
    return cfg


def test_config_says_what_is_drawn():
    choice = build_semantic_mapper(
        make_cfg("INPUT.SCALE_CHOICES", (0.5, 2.0), "INPUT.CROP.ENABLED", True,
                 "INPUT.CROP.SIZE", [7, 9])
    )  # fmt: skip
    assert choice.augmentation == ScaleChoice((0.5, 2.0), (7, 9), flip=True)
    options = ["INPUT.FIXED_SIZE", (32, 48), "INPUT.RANDOM_SCALE", (0.75, 1.25)]
    options += ["INPUT.RANDOM_ROTATION", 5.0, "MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]]
    cfg = make_cfg(*options, "INPUT.RANDOM_FLIP", "none")
    frames = RandomFrame((32, 48), (124, 116, 104), (0.75, 1.25), (), 5.0)  # the mean is BGR
    assert build_train_mapper(cfg).augmentation == frames
    assert build_semantic_mapper(cfg).crop is None
    assert build_test_mapper(cfg).augmentation == FixedSize((32, 48))
    cfg.INPUT.FORMAT, cfg.MODEL.META_ARCHITECTURE = "RGB", "DepthEstimator"
    depth = build_train_mapper(cfg)
    assert depth.augmentation.fill == (104, 116, 124)
    assert depth.image_format == "RGB"
    transform = build_test_mapper(cfg).augmentation.draw(None, 10, 20)
    assert (transform.old, transform.new, transform.flip) == ((10, 20), (32, 48), False)
