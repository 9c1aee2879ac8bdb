"""What the dense pose branch is trained on: points of the surface, and the parts of the body.

Shapes: N images, Ri regions in image i, R = sum(Ri), Gi objects in image i, P points of all regions
together, S the side of what is predicted for a region; K and C as in `densepose_head`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from moco_det.densepose.points import BOX_SIDE, DensePosePoints
from moco_det.native.modeling.densepose_head import Charts
from moco_det.native.modeling.sampling import RegionSamples

Points = list[list[DensePosePoints | None]]  # of the N images' objects


def matched_points(samples: RegionSamples, points: Points) -> list[DensePosePoints | None]:
    """Those of each region's object, R."""
    pairs = zip(points, samples.matched, strict=True)
    return [of_image[i] for of_image, index in pairs for i in index.tolist()]


def with_dense_pose(samples: RegionSamples, points: Points, iou_threshold: float) -> RegionSamples:
    """The regions that overlap their object by more than the threshold, if that is annotated."""
    boxes = torch.cat(samples.boxes)
    overlap = box_iou(boxes, samples.gt_boxes).diagonal() > iou_threshold
    annotated = [found is not None for found in matched_points(samples, points)]
    return samples.where(overlap & torch.tensor(annotated, dtype=torch.bool, device=boxes.device))


class PackedPoints(NamedTuple):
    """All points of the regions, with the place of each in what is predicted for its region."""

    region: Tensor  # (P,) int64
    charts: Tensor  # (P,) int64, 0 for background
    u: Tensor  # (P,)
    v: Tensor
    grid_x: Tensor  # (P,), from 0 to S across the region
    grid_y: Tensor
    inside: Tensor  # (P,) bool, of the region

    def where(self, keep: Tensor) -> "PackedPoints":
        return PackedPoints(*(values[keep] for values in self))


def pack_points(
    regions: list[tuple[int, DensePosePoints]], boxes: Tensor, gt_boxes: Tensor, side: int
) -> PackedPoints:
    """Points relative to the boxes of their objects -> on the grids of their regions.

    Args:
        regions: (number of the region, its points), at least one.
        boxes, gt_boxes: (R, 4), of the regions and of their objects.
        side: S.
    """
    counts = torch.tensor([len(points.x) for _, points in regions], device=boxes.device)
    number = torch.tensor([index for index, _ in regions], device=boxes.device)
    region = number.repeat_interleave(counts)
    x, y, charts, u, v = (
        torch.cat([getattr(points, name) for _, points in regions])
        for name in ("x", "y", "charts", "u", "v")
    )
    corner, sides = boxes[region, :2], (boxes[:, 2:] - boxes[:, :2])[region]
    gt_corner, gt_sides = gt_boxes[region, :2], (gt_boxes[:, 2:] - gt_boxes[:, :2])[region]
    # In this order, that no point goes over the border of its region by rounding in one engine.
    offset = gt_corner + torch.stack([x, y], dim=1) * gt_sides / float(BOX_SIDE) - corner
    inside = ((offset >= 0) & (offset < sides)).all(dim=1)
    grid = offset * side / sides
    return PackedPoints(region, charts, u, v, grid[:, 0], grid[:, 1], inside)


def _corners(at: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbours below and above on an axis, and the weight of the one above.

    The value of cell i is taken at i, its border, not at its centre (Detectron2).
    """
    low = at.floor().long().clamp(0, side - 1)
    high = (low + 1).clamp(max=side - 1)
    return low, high, at.minimum(high.to(at)) - low


def values_at(maps: Tensor, points: PackedPoints, charts: Tensor | slice) -> Tensor:
    """(R, C, S, S) interpolated bilinearly at the P points.

    Args:
        charts: (P,) the channel to look at, for the result (P,); or slice(None) for (P, C).
    """
    side = maps.shape[-1]
    x_low, x_high, x_weight = _corners(points.grid_x, side)
    y_low, y_high, y_weight = _corners(points.grid_y, side)
    if isinstance(charts, slice):
        x_weight, y_weight = x_weight[:, None], y_weight[:, None]
    region = points.region
    return (
        maps[region, charts, y_low, x_low] * ((1 - x_weight) * (1 - y_weight))
        + maps[region, charts, y_low, x_high] * (x_weight * (1 - y_weight))
        + maps[region, charts, y_high, x_low] * ((1 - x_weight) * y_weight)
        + maps[region, charts, y_high, x_high] * (x_weight * y_weight)
    )


def resample_parts(parts: Tensor, gt_boxes: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Parts over the objects' boxes -> over the regions: int64 (R, side, side).

    Cells are looked up at their upper left corners, the nearest pixel there; beyond the object's
    box is background. The box's far edges are the centres of its last pixels (Detectron2).

    Args:
        parts: uint8 (R, 256, 256).
        gt_boxes, boxes: (R, 4).
    """
    gt_sides = gt_boxes[:, 2:] - gt_boxes[:, :2]
    begin = 2 * (boxes[:, :2] - gt_boxes[:, :2]) / gt_sides - 1  # -1 to 1 across the object
    size = boxes[:, 2:] - boxes[:, :2]
    end = 2 * (boxes[:, :2] + size - gt_boxes[:, :2]) / gt_sides - 1
    step = torch.arange(side, device=boxes.device, dtype=boxes.dtype) / side
    x = step * (end - begin)[:, :1] + begin[:, :1]
    y = step * (end - begin)[:, 1:] + begin[:, 1:]
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=3)
    looked_up = F.grid_sample(
        parts[:, None].to(grid), grid, mode="nearest", padding_mode="zeros", align_corners=True
    )
    return looked_up[:, 0].long()


@dataclass(frozen=True)
class DensePoseChartLoss:
    """The loss of the charts and of the coarse segmentation, by Detectron2's names.

    Args:
        index_weight: of "loss_densepose_S", cross-entropy of the coarse segmentation.
        part_weight: of "loss_densepose_I", mean cross-entropy of the charts at the points.
        point_weight: of "loss_densepose_U" and "loss_densepose_V", smooth L1 on the points' own
            charts, summed over the points of all regions and not divided by their number.
    """

    index_weight: float
    part_weight: float
    point_weight: float

    def __call__(
        self, predicted: Charts, samples: RegionSamples, points: Points
    ) -> dict[str, Tensor]:
        """All are 0, and have gradients, where no annotated point is on a body and in a region.

        Args:
            predicted: for the R regions of `samples`, all of which `with_dense_pose` has kept.
            points: of the N images' objects.
        """
        annotated = enumerate(matched_points(samples, points))
        regions = [(i, found) for i, found in annotated if found is not None and len(found.x)]
        boxes = torch.cat(samples.boxes)
        if regions:
            packed = pack_points(regions, boxes, samples.gt_boxes, predicted.u.shape[-1])
            packed = packed.where(packed.inside)
        if not regions or not (packed.charts > 0).any():
            return {
                "loss_densepose_U": predicted.u.sum() * 0,
                "loss_densepose_V": predicted.v.sum() * 0,
                "loss_densepose_I": predicted.fine.sum() * 0,
                "loss_densepose_S": predicted.coarse.sum() * 0,
            }
        parts_loss = self._parts_loss(predicted.coarse, regions, boxes, samples.gt_boxes)
        return self._point_losses(predicted, packed) | {"loss_densepose_S": parts_loss}

    def _point_losses(self, predicted: Charts, points: PackedPoints) -> dict[str, Tensor]:
        fine = values_at(predicted.fine, points, slice(None))
        on_body = points.where(points.charts > 0)
        u = values_at(predicted.u, on_body, on_body.charts)
        v = values_at(predicted.v, on_body, on_body.charts)
        return {
            "loss_densepose_U": self._uv_loss(u, on_body.u),
            "loss_densepose_V": self._uv_loss(v, on_body.v),
            "loss_densepose_I": F.cross_entropy(fine, points.charts) * self.part_weight,
        }

    def _uv_loss(self, found: Tensor, expected: Tensor) -> Tensor:
        loss = F.smooth_l1_loss(found, expected.to(found), reduction="sum")
        return loss * self.point_weight

    def _parts_loss(
        self,
        coarse: Tensor,
        regions: list[tuple[int, DensePosePoints]],
        boxes: Tensor,
        gt_boxes: Tensor,
    ) -> Tensor:
        """0 where one of the objects has no parts: Detectron2 then leaves out the others too."""
        if any(points.parts is None for _, points in regions):
            return coarse.sum() * 0
        number = torch.tensor([index for index, _ in regions], device=boxes.device)
        parts = torch.stack([points.parts for _, points in regions])
        target = resample_parts(parts, gt_boxes[number], boxes[number], coarse.shape[-1])
        if coarse.shape[1] == 2:
            target = (target > 0).long()
        return F.cross_entropy(coarse[number], target) * self.index_weight


def build_densepose_loss(cfg) -> DensePoseChartLoss:
    head = cfg.MODEL.ROI_DENSEPOSE_HEAD
    return DensePoseChartLoss(head.INDEX_WEIGHTS, head.PART_WEIGHTS, head.POINT_REGRESSION_WEIGHTS)
