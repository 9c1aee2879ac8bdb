"""Label maps as Detectron2's inputs, with it and with a stand-in for it."""

import numpy as np
import pytest
import torch
from PIL import Image

from moco_det.common.errors import UserError
from moco_det.config.loading import get_cfg


@pytest.fixture
def record(tmp_path):
    """An image of 20 x 30 whose red channel says the row, and its green one the column."""
    rows, columns = np.mgrid[:20, :30].astype(np.uint8)
    pixels = np.stack([rows, columns, np.full_like(rows, 200)], axis=2)
    labels = (rows // 5).astype(np.uint8)
    labels[:, -1] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(labels).save(tmp_path / "b.png")
    return {
        "file_name": str(tmp_path / "a.png"),
        "sem_seg_file_name": str(tmp_path / "b.png"),
        "image_id": "a",
        "height": 20,
        "width": 30,
    }


def test_a_scale_is_drawn_and_applied(plugin):
    np.random.seed(0)
    image = np.zeros((40, 60, 3), np.uint8)
    factors = []
    for _ in range(200):
        transform = plugin.frames.RandomScale(0.5, 2.0).get_transform(image)
        assert (transform.h, transform.w) == (40, 60)
        assert transform.interp == Image.BILINEAR
        factors.append(transform.new_w / 60)
        assert abs(transform.new_h - transform.new_w / 1.5) < 1  # both sides by one factor
    assert 0.5 <= min(factors) < 0.55
    assert 1.95 < max(factors) <= 2.0
    assert np.mean(factors) == pytest.approx(1.25, abs=0.1)  # four deviations of the mean


def make_mapper(plugin, augmentations=(), size=None, **options):
    options = {"image_format": "RGB", "num_classes": 4, "padding": (1.5, 2.0, 3.0)} | options
    return plugin.pixel_data.SemanticDatasetMapper(list(augmentations), size=size, **options)


def test_an_input_without_augmentation(plugin, record):
    item = make_mapper(plugin)(record)
    assert item.keys() == {*record, "image", "sem_seg"}
    assert (item["image"].dtype, item["sem_seg"].dtype) == (torch.uint8, torch.int64)
    assert item["image"].shape == (3, 20, 30)
    assert item["image"][:, 7, 11].tolist() == [7, 11, 200]
    assert item["sem_seg"][7, 11] == 1
    assert (item["sem_seg"][:, -1] == 255).all()
    bgr = make_mapper(plugin, image_format="BGR")(record)
    assert torch.equal(bgr["image"], item["image"].flip(0))


def test_what_is_too_small_is_padded_with_the_mean_and_ignored(plugin, record):
    item = make_mapper(plugin, size=(24, 33), ignore_value=9)(record)
    assert item["image"].shape == (3, 24, 33)
    assert item["image"][:, 7, 11].tolist() == [7, 11, 200]
    assert item["image"][:, 20:].flatten(1).unique(dim=1).squeeze().tolist() == [1.5, 2.0, 3.0]
    assert item["image"][:, :, 30:].flatten(1).unique(dim=1).squeeze().tolist() == [1.5, 2.0, 3.0]
    assert (item["sem_seg"][20:] == 9).all()
    assert (item["sem_seg"][:, 30:] == 9).all()


def test_image_and_labels_are_augmented_alike(plugin, record):
    crop = plugin.pixel_data.T.RandomCrop("absolute", (8, 12))
    seen = set()
    for _ in range(20):
        item = make_mapper(plugin, [crop], size=(8, 12))(record)
        rows, columns = item["image"][0].long(), item["image"][1].long()
        labels = torch.where(columns == 29, 255, rows // 5)
        assert torch.equal(item["sem_seg"], labels)
        seen.add((int(rows[0, 0]), int(columns[0, 0])))
    assert len(seen) > 5


@pytest.mark.parametrize("change", ["size", "label"])
def test_what_does_not_fit_is_refused(plugin, record, change):
    if change == "size":
        record["height"] = 21
        with pytest.raises(Exception, match="21|^$"):
            make_mapper(plugin)(record)
    else:
        with pytest.raises(UserError, match="holds the label 3, but there are 3 classes"):
            make_mapper(plugin, num_classes=3)(record)


def test_a_mapper_of_a_config(plugin):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 7, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5])
    cfg.merge_from_list(["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]])
    plain = plugin.pixel_data.build_semantic_mapper(cfg)
    assert (plain.image_format, plain.num_classes, plain.ignore_value) == ("RGB", 5, 7)
    assert plain.padding.tolist() == [[[1.0]], [[2.0]], [[3.0]]]
    assert plain.size is None
    kinds = [type(augmentation).__name__ for augmentation in plain.augmentations]
    assert kinds == ["ResizeShortestEdge", "RandomFlip"]
    cfg.INPUT.CROP.merge_from_list(["ENABLED", True, "TYPE", "absolute", "SIZE", [11, 13]])
    cfg.INPUT.RANDOM_SCALE = [0.5, 3.0]
    mapper = plugin.pixel_data.build_semantic_mapper(cfg)
    scale, flip, crop = mapper.augmentations
    assert (scale.smallest, scale.largest, type(flip).__name__) == (0.5, 3.0, "RandomFlip")
    assert (crop.crop_type, list(crop.crop_size)) == ("absolute", [11, 13])
    assert list(mapper.size) == [11, 13]
