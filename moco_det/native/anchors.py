"""The reference boxes of the RPN."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
