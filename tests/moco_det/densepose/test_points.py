"""Both forms of dense pose against hand values, files made by others, and DensePose itself."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from densepose_symmetries import write_symmetries
from PIL import Image
from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError
from moco_det.densepose.body import file_path, load_symmetries
from moco_det.densepose.points import (
    MIRRORED_CHARTS,
    MIRRORED_PARTS,
    DensePosePoints,
    decode_iuv,
    encode_iuv,
    has_points,
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


# -- IUV images ------------------------------------------------------------------------------------


def png(mode: str) -> str:
    stream = io.BytesIO()
    Image.new(mode, (3, 2)).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def test_round_trip():
    iuv = np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8)
    result = encode_iuv(iuv)
    assert result["uv_shape"] == [3, 5, 7]
    np.testing.assert_array_equal(decode_iuv(json.loads(json.dumps(result))), iuv)


def test_the_channels_are_red_green_and_blue():
    result = encode_iuv(np.array([[[1]], [[20]], [[255]]], np.uint8))
    with Image.open(io.BytesIO(base64.b64decode(result["uv_data"]))) as image:
        assert (image.format, image.getpixel((0, 0))) == ("PNG", (1, 20, 255))


def test_official_results_are_read(shared_data):
    results = json.loads((shared_data("densepose") / "example_results.json").read_text())
    assert len(results) == 21
    for result in results:
        iuv = decode_iuv(result)
        assert list(iuv.shape) == result["uv_shape"] == [3, *map(int, result["bbox"][:1:-1])]
        assert iuv[0].max() <= 24
        assert (iuv[0] == 0).any()
        # Nothing but the background has no coordinates.
        assert not iuv[1:, iuv[0] == 0].any()


@pytest.mark.parametrize(
    "iuv", [np.zeros((3, 2, 2)), np.zeros((2, 2, 3), np.uint8), np.zeros((3, 0, 2), np.uint8)]
)
def test_other_arrays_are_refused(iuv):
    with pytest.raises(ValueError, match=r"IUV is uint8 \(3, h, w\)"):
        encode_iuv(iuv)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"uv_shape": [3, 2, 3]}, "lacks 'uv_data'"),
        ({"uv_shape": [3, 2, 3], "uv_data": "AAAA"}, "not a PNG in base64"),
        ({"uv_shape": [3, 2, 3], "uv_data": png("L")}, "an image in L of 2x3 pixels"),
        ({"uv_shape": [3, 3, 2], "uv_data": png("RGB")}, r"\[3, 3, 2\] holds .* RGB of 2x3"),
    ],
)
def test_broken_results_are_refused(result, message):
    with pytest.raises(UserError, match=message):
        decode_iuv(result)
