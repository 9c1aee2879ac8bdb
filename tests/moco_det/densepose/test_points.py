"""Dense pose annotations: hand values, a hand-made table of symmetries, and DensePose itself."""

import numpy as np
import pytest
import torch
from densepose_symmetries import write_symmetries
from pycocotools import mask as coco_mask
from scipy.io import savemat

from moco_det.common.errors import UserError
from moco_det.densepose.files import file_path
from moco_det.densepose.points import (
    MIRRORED_CHARTS,
    MIRRORED_PARTS,
    DensePosePoints,
    has_points,
    load_symmetries,
    read_points,
)

# From the data set's documentation: the charts of each part, left and right apart.
SIDES = {
    "hand": ([4], [3]),
    "foot": ([5], [6]),
    "upper leg": ([8, 10], [7, 9]),
    "lower leg": ([12, 14], [11, 13]),
    "upper arm": ([15, 17], [16, 18]),
    "lower arm": ([19, 21], [20, 22]),
}


@pytest.fixture
def symmetries(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_symmetries(file_path("UV_symmetry_transforms.mat"))
    return load_symmetries()


def square(part_rows):
    mask = np.zeros((256, 256), dtype=np.uint8, order="F")
    mask[part_rows, :64] = 1  # in the left quarter
    return coco_mask.encode(mask)


def make_annotation():
    masks = [[] for _ in range(14)]
    masks[1], masks[13] = square(slice(0, 128)), square(slice(100, 256))  # right hand, head
    return {
        "bbox": [0, 0, 10, 10],
        "dp_x": [0.0, 64.0, 255.5, 10.0],
        "dp_y": [1.0, 2.0, 3.0, 4.0],
        "dp_I": [1.0, 3.0, 24.0, 0.0],
        "dp_U": [0.0, 0.5, 1.0, 0.25],
        "dp_V": [1.0, 0.2, 0.0, 0.75],
        "dp_masks": masks,
    }


def test_left_and_right_change_places():
    for left, right in SIDES.values():
        assert sorted(MIRRORED_CHARTS[chart] for chart in left) == right
        assert sorted(MIRRORED_CHARTS[chart] for chart in right) == left
    assert MIRRORED_CHARTS[:3] == (0, 1, 2)
    assert MIRRORED_CHARTS[23:] == (24, 23)  # the halves of the head
    assert MIRRORED_PARTS == (0, 1, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 14)
    for table in (MIRRORED_CHARTS, MIRRORED_PARTS):
        assert [table[other] for other in table] == list(range(len(table)))


def test_an_annotation_is_read():
    points = read_points(make_annotation())
    assert points.charts.dtype == torch.int64
    assert points.charts.tolist() == [1, 3, 24, 0]
    assert points.x.tolist() == [0, 64, 255.5, 10]
    assert points.parts.dtype == torch.uint8
    rows = points.parts[:, 0].tolist()
    assert rows == [2] * 100 + [14] * 156  # the later part hides the earlier
    assert not points.parts[:, 64:].any()


def test_what_an_object_needs():
    annotation = make_annotation()
    assert has_points(annotation)
    del annotation["dp_masks"]
    assert has_points(annotation)
    assert read_points(annotation).parts is None
    del annotation["dp_V"]
    assert not has_points(annotation)


def test_a_broken_mask():
    annotation = make_annotation()
    annotation["dp_masks"][0] = {"size": [256, 256], "counts": "ooo"}
    with pytest.raises(UserError, match="dp_masks is broken"):
        read_points(annotation)


def test_mirrored_by_hand(symmetries):
    mirrored = read_points(make_annotation()).mirrored(symmetries)
    assert mirrored.x.tolist() == [256, 192, 0.5, 246]
    assert mirrored.y.tolist() == [1, 2, 3, 4]
    assert mirrored.charts.tolist() == [1, 4, 23, 0]
    # U and V are looked up in steps of 1 / 255, on the chart that the point was on; background
    # keeps what it has.
    half = 127 / 255
    np.testing.assert_allclose(mirrored.u, [1, 1 - half, 0, 0.25], atol=1e-6)
    np.testing.assert_allclose(mirrored.v, [0.5 + 0.01, 0.1 + 0.03, 0.24, 0.75], atol=1e-6)
    assert mirrored.parts[:, 255].tolist() == [3] * 100 + [14] * 156  # now the left hand
    assert not mirrored.parts[:, :192].any()


def test_points_without_parts_are_mirrored_and_moved(symmetries):
    annotation = make_annotation()
    del annotation["dp_masks"]
    points = read_points(annotation)
    assert points.mirrored(symmetries).parts is None
    assert points.to(torch.device("cpu")).parts is None


def test_no_file_of_symmetries(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(UserError) as raised:
        load_symmetries()
    message = str(raised.value)
    assert "RANDOM_FLIP horizontal" in message
    assert "https://dl.fbaipublicfiles.com/densepose/data/UV_symmetry_transforms.mat" in message
    assert str(file_path("UV_symmetry_transforms.mat").parent) in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"U_transforms": np.zeros((1, 24))}, "U_transforms and V_transforms"),
        ({name: np.zeros((1, 3, 256, 256)) for name in ("U_transforms", "V_transforms")}, "not"),
    ],
)
def test_another_file_than_that_of_symmetries(tmp_path, monkeypatch, content, message):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    path = file_path("UV_symmetry_transforms.mat")
    path.parent.mkdir(parents=True)
    savemat(path, content)
    with pytest.raises(UserError, match=message) as raised:
        load_symmetries()
    assert str(path) in str(raised.value)


def test_mirrored_as_by_densepose(symmetries):
    """Its own annotation, with its own reader of the same file."""
    structures = pytest.importorskip("densepose.structures")
    transforms = pytest.importorskip("detectron2.data.transforms")
    random = np.random.RandomState(0)
    annotation = make_annotation() | {
        "dp_I": random.randint(1, 25, 50).astype(float).tolist(),
        **{key: random.uniform(0, 256, 50).tolist() for key in ("dp_x", "dp_y")},
        **{key: random.uniform(0, 1, 50).tolist() for key in ("dp_U", "dp_V")},
    }
    theirs = structures.DensePoseDataRelative(annotation)
    data = structures.DensePoseTransformData.load(str(file_path("UV_symmetry_transforms.mat")))
    flip = transforms.TransformList([transforms.HFlipTransform(640)])
    theirs.apply_transform(flip, data)
    ours: DensePosePoints = read_points(annotation).mirrored(symmetries)
    pairs = [
        (ours.x, theirs.x),
        (ours.y, theirs.y),
        (ours.charts.float(), theirs.i),
        (ours.u, theirs.u),
        (ours.v, theirs.v),
        (ours.parts.float(), theirs.segm),
    ]
    for found, expected in pairs:
        assert torch.equal(found, expected)
