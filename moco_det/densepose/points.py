"""What one object's dense pose annotation is to a model, and what becomes of it in a mirror.

The body's surface is cut into 24 charts; a point of it is a chart and two coordinates U and V in
[0, 1] on that chart (Güler et al. 2018). P points are annotated on an object. Their places are
relative to the object's box: 0 is its left or upper edge and 256 the other, whatever its size, so
that resizing the image moves nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from moco_det.common.errors import UserError
from moco_det.densepose import files as densepose_files

BOX_SIDE = 256  # of the square that every box is stretched to
NUM_CHARTS = 24
NUM_PARTS = 14  # of the coarse segmentation
KEYS = ("dp_x", "dp_y", "dp_I", "dp_U", "dp_V")  # of an annotated object; "dp_masks" may be absent

# Left and right change places: hands, feet, legs and arms. Index 0 is the background; the two
# charts of the torso (1, 2) and its part (1), and the head's part (14), lie across the mirror.
MIRRORED_CHARTS = (0, 1, 2, *(c + 1 if c % 2 else c - 1 for c in range(3, NUM_CHARTS + 1)))
MIRRORED_PARTS = (0, 1, *(p - 1 if p % 2 else p + 1 for p in range(2, NUM_PARTS)), NUM_PARTS)


class Symmetries(NamedTuple):
    """What becomes of U and V in a mirror: (24, 256, 256) each, [chart - 1, V * 255, U * 255]."""

    u: Tensor
    v: Tensor


@dataclass(frozen=True)
class DensePosePoints:
    """Of one object."""

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
    """The dense pose of an object that `has_points`; see `moco_det.datasets.densepose`.

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


def load_symmetries() -> Symmetries:
    """Of the user's file, see `moco_det.densepose.files`.

    Raises:
        UserError: it is absent, or not what it should be.
    """
    name = densepose_files.SYMMETRIES
    densepose_files.require([name], "INPUT.RANDOM_FLIP horizontal of a dense pose model")
    path = densepose_files.file_path(name)
    content = densepose_files.read_mat(path)
    try:
        u, v = (
            torch.from_numpy(np.stack(list(content[key][0])).astype(np.float32))
            for key in ("U_transforms", "V_transforms")
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold U_transforms and V_transforms: {error}") from error
    expected = (NUM_CHARTS, BOX_SIDE, BOX_SIDE)
    if u.shape != expected or v.shape != expected:
        raise UserError(
            f"{path}: U_transforms and V_transforms are {tuple(u.shape)} and {tuple(v.shape)}, "
            f"not {expected}"
        )
    return Symmetries(u, v)
