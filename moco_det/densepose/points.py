"""The two forms of an object's dense pose: points that were annotated, an image that is predicted.

The body's surface is cut into 24 charts; a point of it is a chart and two coordinates U and V in
[0, 1] on that chart (Güler et al. 2018).

Annotated are P points of an object. Their positions are relative to the object's box: 0 is its left
or upper edge and 256 the other, whatever its size, so that resizing the image moves nothing.

Predicted is an IUV image inside the object's box: chart (I), U and V. It is stored as in the
results format of COCO's DensePose task, a PNG in base64 with three channels, the chart (0 for the
background, 1 to 24) and U and V from 0 to 255, of the size of the box in whole pixels.
"""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from moco_det.common.errors import UserError

BOX_SIDE = 256  # of the square that every box is stretched to
NUM_CHARTS = 24
NUM_PARTS = 14  # of the coarse segmentation
KEYS = ("dp_x", "dp_y", "dp_I", "dp_U", "dp_V")  # of an annotated object; "dp_masks" may be absent

# A mirror swaps left and right: hands, feet, legs and arms. Index 0 is the background; the two
# charts of the torso (1, 2) and its part (1), and the head's part (14), lie across the mirror.
MIRRORED_CHARTS = (0, 1, 2, *(c + 1 if c % 2 else c - 1 for c in range(3, NUM_CHARTS + 1)))
MIRRORED_PARTS = (0, 1, *(p - 1 if p % 2 else p + 1 for p in range(2, NUM_PARTS)), NUM_PARTS)


class Symmetries(NamedTuple):
    """What becomes of U and V in a mirror: (24, 256, 256) each, [chart - 1, V * 255, U * 255]."""

    u: Tensor
    v: Tensor


@dataclass(frozen=True)
class DensePosePoints:
    """The annotated points of one object."""

    x: Tensor  # (P,), from 0 to 256 across the box
    y: Tensor
    charts: Tensor  # (P,) int64, 1 to 24; 0 is background
    u: Tensor  # (P,), 0 to 1
    v: Tensor
    parts: Tensor | None  # (256, 256) uint8 over the box, 1 to 14; 0 is background

    def to(self, device: torch.device) -> "DensePosePoints":
        names = ("x", "y", "charts", "u", "v", "parts")
        moved = {n: getattr(self, n) for n in names}
        return DensePosePoints(
            **{n: t if t is None else t.to(device, non_blocking=True) for n, t in moved.items()}
        )

    def mirrored(self, symmetries: Symmetries) -> "DensePosePoints":
        """The annotation of the image flipped left-right, to the numbers of Detectron2."""
        index = self.charts - 1, (self.v * 255).long(), (self.u * 255).long()
        on_body = self.charts > 0
        parts = self.parts
        if parts is not None:
            parts = torch.tensor(MIRRORED_PARTS, dtype=torch.uint8)[parts.flip(1).long()]
        return replace(
            self,
            x=BOX_SIDE - self.x,
            charts=torch.tensor(MIRRORED_CHARTS)[self.charts],
            u=torch.where(on_body, symmetries.u[index], self.u),
            v=torch.where(on_body, symmetries.v[index], self.v),
            parts=parts,
        )


def has_points(annotation: Mapping[str, Any]) -> bool:
    """Whether an object of a record has a dense pose annotation, as Detectron2 decides it."""
    return all(key in annotation for key in KEYS)


def read_points(annotation: Mapping[str, Any]) -> DensePosePoints:
    """The dense pose of an object that `has_points`; see `moco_det.datasets.coco.dense_pose`.

    Raises:
        UserError: a broken mask.
    """
    x, y, charts, u, v = (torch.tensor(annotation[key], dtype=torch.float32) for key in KEYS)
    masks = annotation.get("dp_masks")
    parts = None if masks is None else decode_parts(masks)
    return DensePosePoints(x, y, charts.long(), u, v, parts)


def decode_parts(masks: list) -> Tensor:
    """The masks of 14 parts, each an RLE or [], as uint8 (256, 256); later ones hide earlier."""
    parts = np.zeros((BOX_SIDE, BOX_SIDE), dtype=np.uint8)
    for part, shape in enumerate(masks, start=1):
        if not shape:
            continue
        try:
            parts[coco_mask.decode(shape) > 0] = part
        except (TypeError, ValueError, IndexError) as error:
            raise UserError(f"a mask of dp_masks is broken: {error}") from error
    return torch.from_numpy(parts)


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
        UserError: a field is absent, the data is not a PNG of three channels, or has another size.
    """
    try:
        shape, data = list(result["uv_shape"]), result["uv_data"]
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            mode, pixels = image.mode, np.array(image)
    except KeyError as error:
        raise UserError(f"a dense pose lacks {error}: it has uv_shape and uv_data") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on bad files
        raise UserError(f"the uv_data of a dense pose is not a PNG in base64: {error}") from error
    if mode != "RGB" or [3, *pixels.shape[:2]] != shape:
        found = f"{mode} of {pixels.shape[0]}x{pixels.shape[1]}"
        raise UserError(f"a dense pose of uv_shape {shape} holds an image in {found} pixels")
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
