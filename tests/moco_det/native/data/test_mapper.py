"""Records to model inputs: by hand, and Detectron2's mappers (recorded, and live)."""

import json

import numpy as np
import pytest
import record_inputs
import record_semantic
import torch
from densepose_symmetries import write_symmetries
from PIL import Image
from pycocotools import mask as coco_mask
from record_inputs import NumpyDraws
from recording import read
from tiny_semantic import save_palette

from moco_det.common.errors import UserError
from moco_det.config.loading import get_cfg
from moco_det.datasets import get_dataset
from moco_det.densepose.points import Symmetries
from moco_det.native.data.mapper import (
    DatasetMapper,
    SemanticDatasetMapper,
    build_semantic_mapper,
    build_train_mapper,
    mirrored_keypoints,
    pad,
)
from moco_det.native.data.transforms import Augmentation, RandomCrop, RandomScale, Transform

NAMES = ("nose", "left_eye", "right_eye")


class Always:
    """An augmentation that draws one transform."""

    def __init__(self, transform):
        self.transform = transform

    def draw(self, rng, height, width):
        return self.transform


def draw_mapper(**options):
    """Halves the size; boxes only, unless asked for more."""
    return DatasetMapper(Augmentation((20,), 100), "BGR", **{"with_targets": True, **options})


def map_once(mapper, record):
    return mapper(record, np.random.default_rng(0))


@pytest.fixture
def record(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    boxes = [
        ([10.0, 10.0, 30.0, 20.0], 1, 0),
        ([0.0, 0.0, 60.0, 40.0], 0, 1),  # crowd
        ([61.0, 5.0, 70.0, 9.0], 2, 0),  # outside the image: empty once clipped
        ([0.0, 30.0, 90.0, 50.0], 3, 0),  # clipped
    ]
    annotations = [{"bbox": b, "category_id": c, "iscrowd": crowd} for b, c, crowd in boxes]
    size = {"image_id": 7, "height": 40, "width": 60}
    return {"file_name": str(tmp_path / "a.png"), "annotations": annotations, **size}


def with_shapes(record, segmentation, keypoints=(1.5, 1.5, 2) * 3):
    """The record with one object only, which has these shapes."""
    thing = {"bbox": [10.0, 10.0, 30.0, 20.0], "category_id": 1, "iscrowd": 0}
    return record | {
        "annotations": [thing | {"segmentation": segmentation, "keypoints": list(keypoints)}]
    }


@pytest.mark.parametrize(("side", "kept"), [(5.0, 1), (0.5, 1), (3e-5, 1), (1e-5, 0), (0.0, 0)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_box_is_left_out_where_it_holds_nothing(record, side, kept, axis):
    """Detectron2 drops boxes of at most 1e-5 pixels on a side, here after the image is halved."""
    box = [10.0, 10.0, 30.0, 20.0]
    box[2 + axis] = box[axis] = 0.0
    box[2 + axis] = side
    annotations = [{"bbox": box, "category_id": 1, "iscrowd": 0}]
    found = map_once(draw_mapper(), record | {"annotations": annotations})
    assert len(found["gt_boxes"]) == len(found["gt_classes"]) == kept


def test_leaves_out_crowds_and_empty_boxes(record):
    item = map_once(draw_mapper(), record)
    assert item["image"].shape == (3, 20, 30)
    assert item["image"].dtype == torch.uint8
    assert (item["image_id"], item["height"], item["width"]) == (7, 40, 60)
    assert item["gt_boxes"].tolist() == [[5, 5, 15, 10], [0, 15, 30, 20]]
    assert item["gt_boxes"].dtype == torch.float32
    assert item["gt_classes"].tolist() == [1, 3]
    assert "gt_masks" not in item
    assert "gt_keypoints" not in item


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_without_objects(record, mask_format):
    mapper = draw_mapper(
        with_masks=True, with_keypoints=True, mask_format=mask_format, mirrored_keypoints=(0, 2, 1)
    )
    item = map_once(mapper, record | {"annotations": []})
    assert item["gt_boxes"].shape == (0, 4)
    assert item["gt_classes"].shape == (0,)
    assert item["gt_keypoints"].shape == (0, 3, 3)
    if mask_format == "polygon":
        assert item["gt_masks"] == []
    else:
        assert item["gt_masks"].shape == (0, 20, 30)


def test_without_targets(record):
    assert set(map_once(draw_mapper(with_targets=False), record)) == {
        *("image", "image_id", "height", "width")
    }


def test_refuses_an_image_of_another_size_than_annotated(record):
    with pytest.raises(UserError, match=r"a\.png is 60x40 .* says 61x40"):
        map_once(draw_mapper(), record | {"width": 61})


def test_masks_by_hand(record):
    """A square of 8 x 4 pixels, halved, in both formats and from both kinds of annotation."""
    square = [[10, 12, 18, 12, 18, 16, 10, 16]]
    pixels = np.zeros((40, 60), dtype=np.uint8)
    pixels[12:16, 10:18] = 1
    expected = torch.zeros(1, 20, 30, dtype=torch.bool)
    expected[0, 6:8, 5:9] = True
    rle = coco_mask.encode(np.asfortranarray(pixels))
    for segmentation in (square, rle):
        mapper = draw_mapper(with_masks=True, mask_format="bitmask")
        item = map_once(mapper, with_shapes(record, segmentation))
        assert item["gt_masks"].dtype == torch.bool
        assert torch.equal(item["gt_masks"], expected)
    ((polygon,),) = map_once(draw_mapper(with_masks=True), with_shapes(record, square))["gt_masks"]
    assert polygon.dtype == np.float64
    assert polygon.tolist() == [5, 6, 9, 6, 9, 8, 5, 8]


def test_a_broken_mask_is_one_clear_error(record):
    runs = coco_mask.frPyObjects({"size": [40, 60], "counts": [3, 9999]}, 40, 60)
    mapper = draw_mapper(with_masks=True, mask_format="bitmask")
    with pytest.raises(UserError, match=r"a\.png: a run-length encoded mask is broken"):
        map_once(mapper, with_shapes(record, runs))


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_an_object_with_an_empty_mask_is_left_out(record, mask_format):
    mapper = draw_mapper(with_masks=True, mask_format=mask_format)
    item = map_once(mapper, with_shapes(record, []))
    assert len(item["gt_masks"]) == len(item["gt_boxes"]) == len(item["gt_classes"]) == 0


def test_keypoints_by_hand(record):
    keypoints = [10, 20, 2, 30, 20, 1, 50, 41, 2]  # the last one lies below the image
    mapper = DatasetMapper(
        Always(Transform((40, 60), (20, 30), flip=True)), "BGR", with_targets=True,
        with_keypoints=True, mirrored_keypoints=(0, 2, 1),
    )  # fmt: skip
    found = map_once(mapper, with_shapes(record, None, keypoints))["gt_keypoints"]
    assert found.dtype == torch.float32
    assert found.tolist() == [[[25, 10, 2], [0, 0, 0], [15, 10, 1]]]


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"with_masks": True}, None, "an object has no segmentation"),
        ({"with_masks": True}, "rle", "set INPUT.MASK_FORMAT bitmask"),
        ({"with_masks": True, "mask_format": "bitmask"}, "rle", r"a mask is of size \(3, 4\)"),
        ({"with_keypoints": True, "mirrored_keypoints": (0, 1)}, None, "the 2 keypoints of its"),
        ({"with_keypoints": True, "mirrored_keypoints": (0, 1)}, "rle", "the 2 keypoints of its"),
    ],
)
def test_annotations_that_lack_what_is_asked_for(record, options, change, message):
    if change == "rle":
        record = with_shapes(record, coco_mask.encode(np.ones((3, 4), np.uint8, order="F")))
    with pytest.raises(UserError, match=rf"a\.png: .*{message}"):
        map_once(draw_mapper(**options), record)


def test_dense_pose_of_some_objects(record):
    """As it is where the image is not flipped; None for an object that has none."""
    record["annotations"][0] |= {key: [1.0, 2.0] for key in ("dp_x", "dp_y", "dp_I")}
    record["annotations"][0] |= {"dp_U": [0.5, 0.25], "dp_V": [0.0, 1.0]}
    record["annotations"][2] |= record["annotations"][0] | {"bbox": [61.0, 5.0, 70.0, 9.0]}
    item = map_once(draw_mapper(with_densepose=True), record)
    points, nothing = item["gt_densepose"]  # the box outside the image has taken its own along
    assert nothing is None
    assert points.x.tolist() == [1, 2]
    assert points.u.tolist() == [0.5, 0.25]
    assert "gt_densepose" not in map_once(draw_mapper(), record)


def test_dense_pose_is_mirrored_with_its_image(record):
    record["annotations"][0] |= {key: [1.0] for key in ("dp_x", "dp_y", "dp_I")}
    record["annotations"][0] |= {"dp_U": [0.0], "dp_V": [1.0]}
    symmetries = Symmetries(torch.full((24, 256, 256), 0.75), torch.zeros(24, 256, 256))
    symmetries.u[0, 255, 0] = 0.25
    mapper = draw_mapper(with_densepose=True, symmetries=symmetries)
    mapper.augmentation = Always(Transform((40, 60), (40, 60), flip=True))
    points = map_once(mapper, record)["gt_densepose"][0]
    assert (points.x.item(), points.u.item(), points.v.item()) == (255, 0.25, 0)


def test_symmetries_are_asked_for_when_the_mapper_is_built(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = get_cfg()
    cfg.MODEL.DENSEPOSE_ON = True
    with pytest.raises(UserError, match="UV_symmetry_transforms.mat"):
        build_train_mapper(cfg)
    cfg.INPUT.RANDOM_FLIP = "none"
    assert build_train_mapper(cfg).with_densepose
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    write_symmetries(tmp_path / "densepose" / "data" / "UV_symmetry_transforms.mat")
    assert build_train_mapper(cfg).symmetries.u.shape == (24, 256, 256)


def write_keypoint_set(folder, names):
    category = {"id": 1, "name": "person"} | ({"keypoints": list(names)} if names else {})
    content = {"images": [], "annotations": [], "categories": [category]}
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(content))
    return f"coco:{folder}/a.json:{folder}"


def test_config_says_what_is_mapped(tmp_path):
    cfg = get_cfg()
    plain = build_train_mapper(cfg)
    assert not plain.with_masks
    assert not plain.with_keypoints
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.DATASETS.TRAIN = (write_keypoint_set(tmp_path / "a", NAMES),)
    full = build_train_mapper(cfg)
    assert full.with_masks
    assert full.with_keypoints
    assert (full.mask_format, full.mirrored_keypoints) == ("bitmask", (0, 2, 1))


def test_keypoints_must_be_the_same_in_all_data_sets(tmp_path):
    first = write_keypoint_set(tmp_path / "a", NAMES)
    assert mirrored_keypoints((first, first)) == (0, 2, 1)
    for folder, names in (("b", NAMES[::-1]), ("c", ())):
        other = write_keypoint_set(tmp_path / folder, names)
        with pytest.raises(UserError, match=r"b|c/a\.json.*one list of names"):
            mirrored_keypoints((first, other))
    with pytest.raises(UserError, match="one list of names"):
        mirrored_keypoints((other,))


@pytest.mark.parametrize("case", record_inputs.CASES)
def test_numbers_recorded_from_detectron2(tmp_path, case):
    expected = read("inputs")[case]
    short_edge, flip, mask_format = record_inputs.CASES[case]
    size = (record_inputs.HEIGHT, record_inputs.WIDTH)
    transform = Augmentation((short_edge,), record_inputs.MAX_SIZE).draw(
        np.random.default_rng(0), *size
    )
    mapper = DatasetMapper(
        Always(Transform(size, transform.new, flip)), "BGR", with_targets=True, with_masks=True,
        with_keypoints=True, mask_format=mask_format,
        mirrored_keypoints=record_inputs.MIRRORED_KEYPOINTS,
    )  # fmt: skip
    item = map_once(mapper, record_inputs.make_record(tmp_path, mask_format))
    assert item["image"].tolist() == expected["image"]
    assert item["gt_boxes"].tolist() == expected["boxes"]
    assert item["gt_classes"].tolist() == expected["classes"]
    assert item["gt_keypoints"].tolist() == expected["keypoints"]
    assert record_inputs.as_lists(item["gt_masks"]) == expected["masks"]


def detectron2_records(records):
    """Our records, as Detectron2's mapper wants them."""
    box_mode = pytest.importorskip("detectron2.structures").BoxMode.XYXY_ABS
    return [
        {**r, "annotations": [{**a, "bbox_mode": box_mode} for a in r["annotations"]]}
        for r in records
    ]


def assert_same_inputs(records, sampling, **options):
    """Both engines' mappers from one state of numpy's global generator, image after image.

    `options`: `with_masks`, `with_keypoints`, `mask_format`, `mirrored_keypoints`.
    """
    data = pytest.importorskip("detectron2.data")
    T = pytest.importorskip("detectron2.data.transforms")
    theirs = data.DatasetMapper(
        True,
        augmentations=[T.ResizeShortestEdge((90, 160), 220, sampling), T.RandomFlip()],
        image_format="BGR",
        use_instance_mask=options.get("with_masks", False),
        use_keypoint=options.get("with_keypoints", False),
        instance_mask_format=options.get("mask_format", "polygon"),
        keypoint_hflip_indices=options.get("mirrored_keypoints"),
    )
    augmentation = Augmentation((90, 160), 220, sampling, flip=True)
    ours = DatasetMapper(augmentation, "BGR", with_targets=True, **options)
    np.random.seed(0)
    expected = [theirs(record) for record in detectron2_records(records)]
    np.random.seed(0)
    found = [ours(record, NumpyDraws()) for record in records]
    for item, other in zip(found, expected, strict=True):
        assert_same_item(item, other)
    return found


def assert_same_item(item, expected):
    instances = expected["instances"]
    assert torch.equal(item["image"], expected["image"])
    assert torch.equal(item["gt_boxes"], instances.gt_boxes.tensor)
    assert torch.equal(item["gt_classes"], instances.gt_classes)
    if instances.has("gt_keypoints"):
        assert torch.equal(item["gt_keypoints"], instances.gt_keypoints.tensor)
    else:
        assert len(item.get("gt_keypoints", ())) == 0
    if not instances.has("gt_masks"):
        assert len(item.get("gt_masks", ())) == 0
    elif isinstance(item["gt_masks"], torch.Tensor):
        assert torch.equal(item["gt_masks"], instances.gt_masks.tensor)
    else:
        outlines = [[p.tolist() for p in polygons] for polygons in item["gt_masks"]]
        assert outlines == [[p.tolist() for p in ps] for ps in instances.gt_masks.polygons]


@pytest.mark.parametrize("sampling", ["choice", "range"])
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_coco_masks_are_detectron2s(shared_data, mask_format, sampling):
    root = shared_data("coco_mini")
    name = f"coco:{root}/annotations/instances_train2017.json:{root}/train2017"
    records = get_dataset(name).records()
    found = assert_same_inputs(records, sampling, with_masks=True, mask_format=mask_format)
    assert sum(len(item["gt_masks"]) for item in found) > 300


def test_coco_keypoints_are_detectron2s(shared_data):
    root = shared_data("coco_mini")
    name = f"coco:{root}/annotations/person_keypoints_train2017.json:{root}/train2017"
    options = {"with_keypoints": True, "mirrored_keypoints": mirrored_keypoints([name])}
    found = assert_same_inputs(get_dataset(name).records(), "choice", **options)
    assert sum(int((item["gt_keypoints"][..., 2] > 0).sum()) for item in found) > 500


@pytest.mark.parametrize("folder", ["bccd_voc/BCCD:test", "voc2012_40/VOC2012:trainval"])
def test_voc_inputs_are_detectron2s(shared_data, folder):
    path, _, split = folder.partition(":")
    root = shared_data(path.split("/")[0]).parent / path
    assert_same_inputs(get_dataset(f"voc:{root}:{split}").records()[:30], "choice")


def test_empty_and_crowd_are_left_out_as_by_detectron2(record):
    assert_same_inputs([record], "choice")
    crowd = [a | {"iscrowd": 1} for a in record["annotations"]]
    assert_same_inputs([record | {"annotations": crowd}], "choice")


def test_mirror_of_a_person_is_detectron2s(shared_data):
    data = pytest.importorskip("detectron2.data")
    utils = pytest.importorskip("detectron2.data.detection_utils")
    root = shared_data("coco_mini")
    name = f"coco:{root}/annotations/person_keypoints_val2017.json:{root}/val2017"
    meta = data.MetadataCatalog.get("keypoints_coco_2017_val")
    dataset = get_dataset(name)
    assert dataset.keypoint_names == tuple(meta.keypoint_names)
    assert dataset.keypoint_flips == tuple(meta.keypoint_flip_map)
    expected = utils.create_keypoint_hflip_indices("keypoints_coco_2017_val")
    assert mirrored_keypoints([name]) == tuple(expected)


# -- semantic segmentation ------------------------------------------------------------------------

MEAN = (123.675, 116.28, 103.53)


class AlwaysDraw:
    """An augmentation and a crop that are not random."""

    def __init__(self, drawn):
        self.drawn = drawn

    def draw(self, rng, height, width):
        return self.drawn


@pytest.fixture
def semantic_record(tmp_path):
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


def test_flip_crop_and_labels_by_hand(semantic_record):
    window = AlwaysDraw((slice(3, 8), slice(10, 17)))
    window.size = (5, 7)
    item = mapper(AlwaysDraw(Transform((40, 60), (40, 60), flip=True)), window)(
        semantic_record, None
    )
    assert item["image"].dtype == torch.uint8
    assert item["sem_seg"].dtype == torch.int64
    assert (item["image_id"], item["height"], item["width"]) == ("a", 40, 60)
    columns = torch.arange(49, 42, -1)  # columns 10 to 16 of the flipped image
    assert torch.equal(item["image"][0], torch.arange(3, 8).view(5, 1).expand(5, 7).byte())
    assert torch.equal(item["image"][1], columns.expand(5, 7).byte())
    assert item["sem_seg"].tolist() == [[255] * 7] + [(columns // 10).tolist()] * 4


def test_small_images_are_padded_with_the_mean_pixel_and_ignored_labels(semantic_record):
    item = mapper(AlwaysDraw(Transform((40, 60), (20, 30))), RandomCrop((33, 17)))(
        semantic_record, np.random.default_rng(0)
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


def test_without_a_crop_sizes_are_the_drawn_ones(semantic_record):
    item = mapper(Augmentation((20,), 100))(semantic_record, np.random.default_rng(0))
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
def test_bad_label_maps(semantic_record, labels, message):
    if labels is None:
        with open(semantic_record["sem_seg_file_name"], "wb") as file:
            file.write(b"no image")
    else:
        Image.fromarray(labels).save(semantic_record["sem_seg_file_name"])
    with pytest.raises(UserError, match=message):
        mapper(Augmentation((20,), 100))(semantic_record, np.random.default_rng(0))


def test_a_bad_photograph(semantic_record):
    with pytest.raises(UserError, match=r"a\.png is 60x40 pixels .* says 61x40"):
        mapper(Augmentation((20,), 100))(semantic_record | {"width": 61}, np.random.default_rng(0))


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


def test_label_maps_recorded_from_detectron2(tmp_path):
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
    plugin = pytest.importorskip("moco_det.plugin.pixel_data")
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
