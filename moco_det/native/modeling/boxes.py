"""Box arithmetic, shared by the RPN and the ROI heads, and the RPN's reference boxes, the anchors.

A box is (x0, y0, x1, y1) in pixels of the network's input image, in continuous coordinates: its
width is x1 - x0 (Detectron2's convention, no "+ 1").

Shapes: N anchors or proposals, M ground-truth boxes, A anchors per position of a feature map of
size Hi x Wi.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

# A predicted box is at most 1000 / 16 times as large as the box it refines (Detectron, Detectron2):
# keeps exp() finite at the start of training.
SCALE_CLAMP = math.log(1000.0 / 16)

# Factors of (dx, dy, dw, dh) that bring the deltas to about unit variance (BBOX_REG_WEIGHTS).
Weights = tuple[float, float, float, float]


def _centres_and_sizes(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, y0, x1, y1 = boxes.unbind(-1)
    width, height = x1 - x0, y1 - y0
    return x0 + 0.5 * width, y0 + 0.5 * height, width, height


def encode(boxes: Tensor, targets: Tensor, weights: Weights) -> Tensor:
    """The deltas (dx, dy, dw, dh) that `decode` needs to turn `boxes` into `targets`.

    R-CNN's parametrisation (Girshick et al. 2014, appendix C): dx = wx (tx - x) / w between the
    centres, dw = ww log(tw / w). Both inputs (..., 4), boxes of positive size. A target without
    area gives -inf: empty ground truth must be dropped before.
    """
    x, y, w, h = _centres_and_sizes(boxes)
    tx, ty, tw, th = _centres_and_sizes(targets)
    wx, wy, ww, wh = weights
    deltas = (
        wx * (tx - x) / w,
        wy * (ty - y) / h,
        ww * torch.log(tw / w),
        wh * torch.log(th / h),
    )
    return torch.stack(deltas, dim=-1)


def decode(deltas: Tensor, boxes: Tensor, weights: Weights) -> Tensor:
    """Apply deltas (..., 4) to boxes that broadcast with them; the inverse of `encode`.

    dw and dh are clamped to `SCALE_CLAMP`. Computed in float32 for deltas of any type.
    """
    dx, dy, dw, dh = deltas.float().unbind(-1)
    x, y, w, h = _centres_and_sizes(boxes)
    wx, wy, ww, wh = weights
    x = dx / wx * w + x
    y = dy / wy * h + y
    w = torch.exp((dw / ww).clamp(max=SCALE_CLAMP)) * w
    h = torch.exp((dh / wh).clamp(max=SCALE_CLAMP)) * h
    return torch.stack((x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h), dim=-1)


def nonempty(boxes: Tensor, min_size: float = 0.0) -> Tensor:
    """Mask of the boxes (N, 4) with both sides longer than `min_size`, strictly.

    (`torchvision.ops.remove_small_boxes` keeps sides equal to it, hence boxes of size 0.)
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    return (x1 - x0 > min_size) & (y1 - y0 > min_size)


def pairwise_iou(gt_boxes: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union, (M, 4) x (N, 4) -> (M, N); 0 where both boxes are empty."""
    return box_iou(gt_boxes, boxes).nan_to_num_(0)


# -- anchors --------------------------------------------------------------------------------------


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Anchors around (0, 0), (len(sizes) * len(aspect_ratios), 4), sizes in the outer loop.

    An anchor has area size^2 and height / width = aspect ratio. Nothing is rounded (Detectron2;
    the original Faster R-CNN rounds to whole pixels).
    """
    boxes = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(size**2 / ratio)
            height = ratio * width
            boxes.append([-width / 2, -height / 2, width / 2, height / 2])
    return torch.tensor(boxes, dtype=torch.float32)


def _per_level(values: Sequence, num_levels: int, key: str) -> list[Sequence]:
    """One list per feature map: a flat list, or a list of one list, serves every map."""
    if not isinstance(values[0], Sequence):
        values = [values]
    if len(values) not in (1, num_levels):
        raise ValueError(f"{len(values)} lists of {key} for {num_levels} feature maps")
    return list(values) * (num_levels if len(values) == 1 else 1)


class AnchorGenerator(nn.Module):
    """Detectron2's DefaultAnchorGenerator: cell anchors repeated over every feature-map position.

    Args:
        sizes, aspect_ratios: one list of numbers per feature map, or one for all of them.
        strides: input pixels per feature-map pixel, one per feature map.
        offset: centre of the first anchor, in strides; 0 puts it on the image's corner.
    """

    def __init__(self, sizes, aspect_ratios, strides: Sequence[int], offset: float = 0.0):
        super().__init__()
        sizes = _per_level(sizes, len(strides), "anchor sizes")
        aspect_ratios = _per_level(aspect_ratios, len(strides), "aspect ratios")
        self.strides = list(strides)
        self.offset = offset
        for level, (s, r) in enumerate(zip(sizes, aspect_ratios, strict=True)):
            self.register_buffer(f"cell{level}", cell_anchors(s, r), persistent=False)

    def _cell(self, level: int) -> Tensor:
        return getattr(self, f"cell{level}")

    @property
    def num_anchors(self) -> int:
        """Anchors per position; the RPN's head is shared, so every level must have the same."""
        counts = {len(self._cell(level)) for level in range(len(self.strides))}
        if len(counts) != 1:
            raise ValueError(f"feature maps with different numbers of anchors: {sorted(counts)}")
        return counts.pop()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Feature maps (N, C, Hi, Wi) -> anchors (Hi * Wi * A, 4): rows, columns, then A."""
        anchors = []
        for level, (feature, stride) in enumerate(zip(features, self.strides, strict=True)):
            cell = self._cell(level)
            height, width = feature.shape[-2:]
            y = (torch.arange(height, device=cell.device) + self.offset) * stride
            x = (torch.arange(width, device=cell.device) + self.offset) * stride
            y, x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=-1)
            anchors.append((shifts[:, :, None] + cell).reshape(-1, 4))
        return anchors
