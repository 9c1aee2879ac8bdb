"""Semantic records to training inputs: by hand, and Detectron2's (recorded, and live)."""

import numpy as np
import pytest
import record_semantic
import torch
from PIL import Image
from record_inputs import NumpyDraws
from recording import read
from tiny_semantic import save_palette

from moco_det.common.errors import UserError
from moco_det.config.loading import get_cfg
from moco_det.datasets import get_dataset
from moco_det.native.data.mapper import SemanticDatasetMapper, build_semantic_mapper, pad
from moco_det.native.data.transforms import Augmentation, RandomCrop, RandomScale, Transform

MEAN = (123.675, 116.28, 103.53)


class Always:
    """An augmentation and a crop that are not random."""

    def __init__(self, drawn):
        self.drawn = drawn

    def draw(self, rng, height, width):
        return self.drawn


@pytest.fixture
def record(tmp_path):
    """40 x 60 pixels, whose red is the row and whose green is the column, as is the label."""
    rows, columns = np.mgrid[:40, :60].astype(np.uint8)
    Image.fromarray(np.stack([rows, columns, rows * 0], axis=2)).save(tmp_path / "a.png")
    labels = np.where(rows < 4, 255, columns // 10).astype(np.uint8)
    save_palette(labels, tmp_path / "labels.png")
    return {
        "file_name": str(tmp_path / "a.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "image_id": "a",
        "height": 40,
        "width": 60,
    }


def mapper(augmentation, crop=None, num_classes=6):
    return SemanticDatasetMapper(augmentation, crop, "RGB", num_classes, MEAN)


def test_flip_crop_and_labels_by_hand(record):
    window = Always((slice(3, 8), slice(10, 17)))
    window.size = (5, 7)
    item = mapper(Always(Transform((40, 60), (40, 60), flip=True)), window)(record, None)
    assert item["image"].dtype == torch.uint8
    assert item["sem_seg"].dtype == torch.int64
    assert (item["image_id"], item["height"], item["width"]) == ("a", 40, 60)
    columns = torch.arange(49, 42, -1)  # columns 10 to 16 of the flipped image
    assert torch.equal(item["image"][0], torch.arange(3, 8).view(5, 1).expand(5, 7).byte())
    assert torch.equal(item["image"][1], columns.expand(5, 7).byte())
    assert item["sem_seg"].tolist() == [[255] * 7] + [(columns // 10).tolist()] * 4


def test_small_images_are_padded_with_the_mean_pixel_and_ignored_labels(record):
    item = mapper(Always(Transform((40, 60), (20, 30))), RandomCrop((33, 17)))(
        record, np.random.default_rng(0)
    )
    image, labels = item["image"], item["sem_seg"]
    assert image.shape == (3, 33, 17)
    assert image.dtype == torch.float32
    assert labels.shape == (33, 17)
    mean = torch.tensor(MEAN).view(3, 1, 1)
    assert torch.equal(image[:, 20:], mean.expand(3, 13, 17))  # exactly 0 after normalisation
    assert (labels[20:] == 255).all()
    assert set(labels[3:20].unique().tolist()) <= set(range(6))
    assert not torch.equal(image[:, :20], mean.expand(3, 20, 17))


def test_without_a_crop_sizes_are_the_drawn_ones(record):
    item = mapper(Augmentation((20,), 100))(record, np.random.default_rng(0))
    assert item["image"].shape == (3, 20, 30)
    assert item["image"].dtype == torch.uint8
    assert item["sem_seg"].shape == (20, 30)


def test_pad_leaves_alone_what_is_large_enough():
    x = torch.zeros(3, 4, dtype=torch.uint8)
    assert pad(x, (3, 4), 7) is x
    assert pad(x, (3, 5), 7).tolist() == [[0, 0, 0, 0, 7]] * 3


def test_scales_are_uniform_and_of_both_sides():
    rng = np.random.default_rng(0)
    scale = RandomScale(0.5, 2.0, flip=True)
    drawn = [scale.draw(rng, 1000, 2000) for _ in range(2000)]
    heights = np.array([g.new[0] for g in drawn])
    assert all(abs(g.new[1] - 2 * g.new[0]) <= 1 for g in drawn)
    assert 500 <= heights.min() < 510
    assert 1990 < heights.max() <= 2000
    quartiles = np.quantile(heights, [0.25, 0.5, 0.75])
    assert quartiles == pytest.approx([875, 1250, 1625], abs=50)  # 5 standard errors
    assert np.mean([g.flip for g in drawn]) == pytest.approx(0.5, abs=0.05)
    assert not any(RandomScale(0.5, 2.0).draw(rng, 10, 10).flip for _ in range(50))


def test_crops_are_everywhere_and_nowhere_else():
    rng = np.random.default_rng(0)
    crop = RandomCrop((4, 9))
    seen = {
        (r.start, r.stop, c.start, c.stop) for r, c in (crop.draw(rng, 6, 7) for _ in range(99))
    }
    assert seen == {(top, top + 4, 0, 7) for top in range(3)}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((40, 60), 6, np.uint8), r"labels\.png holds the label 6, but there are 6 classes"),
        (
            np.zeros((40, 59), np.uint8),
            r"labels\.png is 59x40 pixels, its image .*a\.png 60x40",
        ),
        (np.zeros((40, 60), np.uint16), r"labels\.png is of Pillow's mode I;16"),
        (np.zeros((40, 60, 3), np.uint8), r"labels\.png is of Pillow's mode RGB.*not colours"),
        (None, r"cannot read the label map .*labels\.png"),
    ],
)
def test_bad_label_maps(record, labels, message):
    if labels is None:
        with open(record["sem_seg_file_name"], "wb") as file:
            file.write(b"no image")
    else:
        Image.fromarray(labels).save(record["sem_seg_file_name"])
    with pytest.raises(UserError, match=message):
        mapper(Augmentation((20,), 100))(record, np.random.default_rng(0))


def test_a_bad_photograph(record):
    with pytest.raises(UserError, match=r"a\.png is 60x40 pixels .* says 61x40"):
        mapper(Augmentation((20,), 100))(record | {"width": 61}, np.random.default_rng(0))


def test_config_says_what_is_drawn():
    cfg = get_cfg()
    plain = build_semantic_mapper(cfg)
    assert (plain.augmentation.sizes, plain.augmentation.max_size) == ((800,), 1333)
    assert plain.crop is None
    cfg.INPUT.RANDOM_SCALE = (0.5, 2.0)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.SIZE = True, [769, 513]
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 19
    full = build_semantic_mapper(cfg)
    assert (full.augmentation.smallest, full.augmentation.largest) == (0.5, 2.0)
    assert full.augmentation.flip
    assert full.crop.size == (769, 513)
    assert (full.image_format, full.num_classes) == ("RGB", 19)
    assert full.padding.flatten().tolist() == pytest.approx(cfg.MODEL.PIXEL_MEAN)
    cfg.INPUT.RANDOM_FLIP = "none"
    assert not build_semantic_mapper(cfg).augmentation.flip


def test_numbers_recorded_from_detectron2(tmp_path):
    ours = SemanticDatasetMapper(
        RandomScale(*record_semantic.SCALE, flip=True),
        RandomCrop(record_semantic.CROP),
        "RGB",
        record_semantic.CLASSES,
        record_semantic.MEAN,
    )
    record = record_semantic.make_record(tmp_path)
    np.random.seed(0)
    found = [record_semantic.as_rows(ours(record, NumpyDraws())) for _ in range(12)]
    expected = read("semantic")["inputs"]
    assert {row[0] for row in expected} == {"uint8", "float32"}  # some are padded, some are not
    for row, other in zip(found, expected, strict=True):
        assert row[:3] == other[:3]
        assert row[3:] == pytest.approx(other[3:], rel=1e-9)


@pytest.mark.parametrize("random_scale", [(0.5, 2.0), ()])
@pytest.mark.parametrize(
    "name",
    ["voc_sem_seg:voc2012_seg10/VOC2012:val", "cityscapes_sem_seg:cityscapes_sample:train"],
)
def test_both_engines_draw_the_same_inputs(shared_data, name, random_scale):
    """From one state of numpy's global generator, image after image, to the last bit."""
    plugin = pytest.importorskip("moco_det.plugin.data")
    kind, path, split = name.split(":")
    root = shared_data(path.split("/")[0]).parent / path
    records = get_dataset(f"{kind}:{root}:{split}").records()
    cfg = get_cfg()
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.SIZE, cfg.INPUT.CROP.TYPE = True, [513, 641], "absolute"
    cfg.INPUT.RANDOM_SCALE = random_scale
    cfg.INPUT.MIN_SIZE_TRAIN = (300, 700)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 21
    ours, theirs = build_semantic_mapper(cfg), plugin.build_semantic_mapper(cfg)
    np.random.seed(0)
    expected = [theirs(record) for record in records]
    np.random.seed(0)
    found = [ours(record, NumpyDraws()) for record in records]
    for item, other in zip(found, expected, strict=True):
        assert item["image"].shape == (3, 513, 641)
        assert item["image"].dtype == other["image"].dtype
        assert torch.equal(item["image"], other["image"])
        assert torch.equal(item["sem_seg"], other["sem_seg"])
        assert {key: other[key] for key in ("image_id", "height", "width")}.items() <= item.items()
