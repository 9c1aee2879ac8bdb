"""Depth maps in files and in predictions: what they hold, and what is refused in one line."""

import math

import numpy as np
import pytest

from moco_det.common.errors import UserError
from moco_det.datasets.depth import decode_depth, encode_depth, read_depth


@pytest.fixture
def record(tmp_path):
    """Of 3 x 4 pixels; its depth map is for the test to write."""
    files = {"file_name": "a.jpg", "depth_file_name": str(tmp_path / "a.npy")}
    return {**files, "height": 3, "width": 4}


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_floats_of_any_size_and_order(record, kind, order):
    depths = np.arange(12).reshape(3, 4) / 4
    np.save(record["depth_file_name"], np.asarray(depths, kind, order=order))
    found = read_depth(record)
    assert found.dtype == np.float32
    assert np.array_equal(found, depths)


GOOD = np.ones((3, 4), np.float32)


def with_value(value):
    depths = GOOD.copy()
    depths[1, 2] = value
    return depths


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD.T, "is 3x4 pixels, its image a.jpg 4x3"),
        (GOOD[0], r"its shape is \(4,\), not \(height, width\)"),
        (GOOD[None], r"its shape is \(1, 3, 4\)"),
        (GOOD.astype(np.int32), "it holds int32, not floats"),
        (with_value(math.nan), "a depth that is not finite; 0 is for unknown ones"),
        (with_value(math.inf), "not finite"),
        (with_value(-0.5), "a depth of -0.5 m, below 0"),
        (with_value(2500.0), "a depth of 2500: it takes metres, to 500"),
        (np.array([[{}]], dtype=object), "it holds object, not floats"),
        (b"", "cannot read the depth map"),
        (b"\x93NUMPY\x01\x00", "cannot read the depth map"),
        (b"no array", "cannot read the depth map"),
    ],
)
def test_what_is_no_depth_map(record, content, message):
    if isinstance(content, bytes):
        with open(record["depth_file_name"], "wb") as file:
            file.write(content)
    else:
        np.save(record["depth_file_name"], content, allow_pickle=content.dtype == object)
    with pytest.raises(UserError, match=message) as error:
        read_depth(record)
    assert "a.npy" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_cut_short_and_one_that_promises_much(record, tmp_path):
    np.save(record["depth_file_name"], GOOD)
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"47 bytes are no \(3, 4\) of float32"):
        read_depth(record)
    (tmp_path / "a.npy").write_bytes(data.replace(b"(3, 4), }   ", b"(3, 400000)}"))
    with pytest.raises(UserError, match=r"48 bytes are no \(3, 400000\)"):
        read_depth(record)
    (tmp_path / "a.npy").unlink()
    with pytest.raises(UserError, match="No such file"):
        read_depth(record)


def test_predictions_are_kept_to_the_millimetre():
    depths = np.array([[0.0, 1.2344, 1.2346], [-3.0, 65.535, 99.0]], np.float32)
    packed = encode_depth(depths)
    assert packed.keys() == {"size", "millimetres"}
    assert packed["size"] == [2, 3]
    expected = np.array([[0, 1.234, 1.235], [0, 65.535, 65.535]])
    assert decode_depth(packed) == pytest.approx(expected, abs=1e-5)
    drawn = np.random.default_rng(0).uniform(0, 10, (40, 50)).astype(np.float32)
    assert np.abs(decode_depth(encode_depth(drawn)) - drawn).max() < 0.000501


@pytest.mark.parametrize("depths", [np.zeros(3), np.zeros((0, 3)), np.full((2, 2), math.nan)])
def test_what_cannot_be_packed(depths):
    with pytest.raises(ValueError, match="depth"):
        encode_depth(depths)


@pytest.mark.parametrize(
    "change",
    [
        {"size": [2, 4]},
        {"size": None},
        {"millimetres": "AAAA"},
        {"millimetres": "%"},
        {"millimetres": 3},
        {"millimetres": ""},
    ],
)
def test_broken_predictions(change):
    with pytest.raises(ValueError, match="predicted depth map"):
        decode_depth({**encode_depth(np.ones((2, 3))), **change})
