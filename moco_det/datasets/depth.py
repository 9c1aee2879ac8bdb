"""Depth maps: how far away each pixel is, in files and in predictions.

In a file: a NumPy array (H, W) of floats in metres, the size of its image, 0 where nothing was
measured. In a prediction: whole millimetres, as a PNG of 16 bits, which is as small as it gets.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from moco_det.common.errors import UserError, one_line
from moco_det.common.images import UnreadableImage, read_bytes
from moco_det.datasets.dataset import Record
from moco_det.datasets.semantic import MappedDataset

FARTHEST = 500.0  # metres; what is beyond was not written in metres
_MILLIMETRES = 2**16 - 1  # the most that a prediction can hold: 65.535 m


@dataclass(frozen=True)
class DepthDataset(MappedDataset):
    """Images with depth maps, and no classes."""

    evaluator: ClassVar[str] = "depth"
    map_key: ClassVar[str] = "depth_file_name"

    def read_map(self, record: Record) -> np.ndarray:
        """See `read_depth`."""
        return read_depth(record)


def read_depth(record: Record) -> np.ndarray:
    """The depth map of a record, float32 (H, W) in metres: 0 where nothing was measured.

    Args:
        record: "depth_file_name", "file_name", "height" and "width".

    Raises:
        UserError: the file cannot be read, is no array of floats of the image's size, or has
            something in it that is no depth.
    """
    path, size = record["depth_file_name"], (record["height"], record["width"])
    depths = _read_array(path)
    if depths.shape != size:
        shape = "x".join(map(str, depths.shape[::-1])) or "one number"
        raise UserError(
            f"depth map {path} is {shape} pixels, its image {record['file_name']} "
            f"{size[1]}x{size[0]}"
        )
    depths = depths.astype(np.float32)
    if not np.isfinite(depths).all():
        raise UserError(f"depth map {path} has a depth that is not finite; 0 is for unknown ones")
    if depths.min() < 0:
        raise UserError(f"depth map {path} has a depth of {depths.min():g} m, below 0")
    if depths.max() > FARTHEST:
        raise UserError(
            f"depth map {path} has a depth of {depths.max():g}: it takes metres, to {FARTHEST:g}"
        )
    return depths


def _read_array(path: str) -> np.ndarray:
    """What a .npy file holds, of floats and two axes; nothing of what it says is believed."""
    try:
        data = read_bytes(path)
        stream = BytesIO(data)
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"its version is {version}")
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, by_column, kind = read_header(stream)
        if kind.kind != "f" or kind.hasobject:
            raise ValueError(f"it holds {kind}, not floats")
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"its shape is {shape}, not (height, width)")
        rest = len(data) - stream.tell()
        if rest != shape[0] * shape[1] * kind.itemsize:
            raise ValueError(f"{rest:,} bytes are no {shape} of {kind}")
        values = np.frombuffer(data, kind, offset=stream.tell())
        return values.reshape(shape, order="F" if by_column else "C")
    except UnreadableImage as error:
        raise UserError(f"cannot read the depth map {path}: {error.reason}") from error
    except Exception as error:  # NumPy raises ValueError, SyntaxError, ... on bad headers
        raise UserError(f"cannot read the depth map {path}: {one_line(error, 120)}") from error


# -- predictions ----------------------------------------------------------------------------------


def encode_depth(depths: np.ndarray) -> dict[str, Any]:
    """Pack the depths (H, W) of one image, in metres.

    They are rounded to millimetres, and below 0 and beyond 65.535 m to these.

    Returns:
        {"size": [H, W], "millimetres": the PNG in base64, a string}.

    Raises:
        ValueError: another shape; a depth that is not a number.
    """
    if depths.ndim != 2 or 0 in depths.shape:
        raise ValueError(f"depths are (H, W), not {depths.shape}")
    if np.isnan(depths).any():
        raise ValueError("a depth is not a number")
    # In float64, in which every float32 and a thousand times it is exact.
    rounded = np.rint(depths.astype(np.float64) * 1000).clip(0, _MILLIMETRES).astype(np.uint16)
    stream = BytesIO()
    Image.fromarray(rounded).save(stream, format="PNG")
    text = base64.b64encode(stream.getvalue()).decode("ascii")
    return {"size": list(depths.shape), "millimetres": text}


def decode_depth(packed: Mapping[str, Any]) -> np.ndarray:
    """Unpack what `encode_depth` has packed: float32 (H, W) in metres.

    Raises:
        ValueError: a field is absent; the data is not such a PNG, or of another size.
    """
    try:
        size, data = list(packed["size"]), base64.b64decode(packed["millimetres"])
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            # Before anything is unpacked, which may be large.
            if image.mode != "I;16" or [image.height, image.width] != size:
                raise ValueError(f"a PNG of mode {image.mode}, {image.height}x{image.width}")
            rounded = np.array(image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on bad files
        reason = one_line(error, 60)
        raise ValueError(f"a predicted depth map is no PNG of 16 bits: {reason}") from error
    return (rounded / 1000).astype(np.float32)
