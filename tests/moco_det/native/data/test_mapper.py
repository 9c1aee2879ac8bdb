"""Records to model inputs: by hand, and Detectron2's mapper (recorded, and live if installed)."""

import json

import numpy as np
import pytest
import record_inputs
import torch
from densepose_symmetries import write_symmetries
from PIL import Image
from pycocotools import mask as coco_mask
from record_inputs import NumpyDraws
from recording import read

from moco_det.common.errors import UserError
from moco_det.config.loading import get_cfg
from moco_det.datasets import get_dataset
from moco_det.densepose.points import Symmetries
from moco_det.native.data.mapper import DatasetMapper, build_train_mapper, mirrored_keypoints
from moco_det.native.data.transforms import Augmentation, Transform

NAMES = ("nose", "left_eye", "right_eye")


class Always:
    """An augmentation that draws one geometry."""

    def __init__(self, geometry):
        self.geometry = geometry

    def draw(self, rng, height, width):
        return self.geometry


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
    geometry = Augmentation((short_edge,), record_inputs.MAX_SIZE).draw(
        np.random.default_rng(0), *size
    )
    mapper = DatasetMapper(
        Always(Transform(size, geometry.new, flip)), "BGR", with_targets=True, with_masks=True,
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
