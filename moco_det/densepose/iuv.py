"""The form in which dense pose is handed around: an image of chart (I), U and V inside a box.

A PNG in base64, as in the results format of COCO's DensePose task: three channels, the chart (0 for
the background, 1 to 24) and U and V from 0 to 255, of the size of the detection's box in whole
pixels.
"""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from moco_det.common.errors import UserError


def encode_iuv(iuv: np.ndarray) -> dict[str, Any]:
    """Pack one detection.

    Args:
        iuv: uint8 (3, h, w), h and w at least 1: chart, U * 255, V * 255.

    Returns:
        {"uv_shape": [3, h, w], "uv_data": the PNG in base64, a string}.

    Raises:
        ValueError: another shape or type.
    """
    if iuv.dtype != np.uint8 or iuv.ndim != 3 or len(iuv) != 3 or 0 in iuv.shape:
        raise ValueError(f"IUV is uint8 (3, h, w), not {iuv.dtype} {iuv.shape}")
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(iuv.transpose(1, 2, 0))).save(stream, format="PNG")
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return {"uv_shape": list(iuv.shape), "uv_data": data}


def decode_iuv(result: dict[str, Any]) -> np.ndarray:
    """Unpack what `encode_iuv`, or anyone else in this format, has packed.

    Returns:
        uint8 (3, h, w).

    Raises:
        UserError: a field is absent, the data is no PNG of three channels, or of another size.
    """
    try:
        shape, data = list(result["uv_shape"]), result["uv_data"]
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            mode, pixels = image.mode, np.array(image)
    except KeyError as error:
        raise UserError(f"a dense pose lacks {error}: it has uv_shape and uv_data") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on bad files
        raise UserError(f"the uv_data of a dense pose is no PNG in base64: {error}") from error
    if mode != "RGB" or [3, *pixels.shape[:2]] != shape:
        found = f"{mode} of {pixels.shape[0]}x{pixels.shape[1]}"
        raise UserError(f"a dense pose of uv_shape {shape} holds an image in {found} pixels")
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
