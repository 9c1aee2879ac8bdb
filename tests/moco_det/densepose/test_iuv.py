"""Dense pose as a PNG in base64, against files made by others."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from moco_det.common.errors import UserError
from moco_det.densepose.iuv import decode_iuv, encode_iuv


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


def png(mode: str) -> str:
    stream = io.BytesIO()
    Image.new(mode, (3, 2)).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"uv_shape": [3, 2, 3]}, "lacks 'uv_data'"),
        ({"uv_shape": [3, 2, 3], "uv_data": "AAAA"}, "no PNG in base64"),
        ({"uv_shape": [3, 2, 3], "uv_data": png("L")}, "an image in L of 2x3 pixels"),
        ({"uv_shape": [3, 3, 2], "uv_data": png("RGB")}, r"\[3, 3, 2\] holds .* RGB of 2x3"),
    ],
)
def test_broken_results_are_refused(result, message):
    with pytest.raises(UserError, match=message):
        decode_iuv(result)
