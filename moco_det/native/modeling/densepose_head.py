"""The dense pose branch of DensePose R-CNN (Güler et al. 2018): network, loss, surfaces.

The loss is Detectron2's DensePose project's: points of the surface, and the parts of the body.

Shapes: N images, Ri proposals in image i, R = sum(Ri), Gi objects in image i, P points of all
proposals together, D detections, S the side of what is predicted for a box, K channels of the
coarse segmentation (2: person or not; 15: one of 14 parts or none), C = 25 charts, the background's
among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from moco_det.common.errors import UserError
from moco_det.common.gpus import upload
from moco_det.densepose.points import BOX_SIDE, NUM_CHARTS, DensePosePoints
from moco_det.native.modeling.boxes import Losses, SampledProposals, Size
from moco_det.native.modeling.layers import kaiming_fill

# -- network --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Charts:
    """What is predicted for R boxes, each in the frame of its box."""

    coarse: Tensor  # (R, K, S, S), logits
    fine: Tensor  # (R, C, S, S), logits of the charts
    u: Tensor  # (R, C, S, S), the coordinate on each chart
    v: Tensor

    def __getitem__(self, index: Tensor | slice) -> "Charts":
        return Charts(self.coarse[index], self.fine[index], self.u[index], self.v[index])

    def split(self, counts: Sequence[int]) -> list["Charts"]:
        """Like `Tensor.split`."""
        fields = (t.split(counts) for t in (self.coarse, self.fine, self.u, self.v))
        return [Charts(*of_image) for of_image in zip(*fields, strict=True)]


class DensePoseV1ConvXHead(nn.Sequential):
    """Convolutions of one width with ReLU, under Detectron2's names.

    Args:
        channels: of the pooled input.
        num_convs: how many.
        dim: their width, the `out_channels`.
        kernel_size: odd.
    """

    def __init__(self, channels: int, num_convs: int, dim: int, kernel_size: int):
        super().__init__()
        for k in range(1, num_convs + 1):
            conv = nn.Conv2d(channels, dim, kernel_size, padding=kernel_size // 2)
            self.add_module(f"body_conv_fcn{k}", conv)
            self.add_module(f"body_conv_fcn_relu{k}", nn.ReLU())
            channels = dim
        self.out_channels = channels
        kaiming_fill(self)


class DensePoseChartPredictor(nn.Module):
    """Four transposed convolutions that double the side, then bilinear upsampling.

    Args:
        channels: of the input.
        num_coarse: K.
        kernel_size: of the transposed convolutions, even.
        up_scale: of the bilinear upsampling.
    """

    def __init__(self, channels: int, num_coarse: int, kernel_size: int, up_scale: int):
        super().__init__()
        self.up_scale = up_scale
        outputs = {"ann_index": num_coarse, "index_uv": 1, "u": 1, "v": 1}
        for name, width in outputs.items():
            width = width if name == "ann_index" else NUM_CHARTS + 1
            layer = nn.ConvTranspose2d(
                channels, width, kernel_size, stride=2, padding=kernel_size // 2 - 1
            )
            self.add_module(f"{name}_lowres", layer)
        kaiming_fill(self)

    def forward(self, x: Tensor) -> Charts:
        """(R, dim, H, W) -> all in float32 at least, S = 2 * H * up_scale."""
        layers = (self.ann_index_lowres, self.index_uv_lowres, self.u_lowres, self.v_lowres)
        return Charts(*(self._upsample(layer(x)) for layer in layers))

    def _upsample(self, x: Tensor) -> Tensor:
        x = F.interpolate(
            x, scale_factor=float(self.up_scale), mode="bilinear", align_corners=False
        )
        return x.to(torch.promote_types(x.dtype, torch.float32))


# -- loss -----------------------------------------------------------------------------------------

Points = list[list[DensePosePoints | None]]  # of the N images' objects; None: not annotated


def matched_points(sampled: SampledProposals, points: Points) -> list[DensePosePoints | None]:
    """Those of each proposal's object, R."""
    matched = iter(torch.cat(sampled.matched).tolist())
    counts = map(len, sampled.matched)
    return [
        of_image[next(matched)]
        for of_image, count in zip(points, counts, strict=True)
        for _ in range(count)
    ]


def select_with_densepose(
    sampled: SampledProposals, points: Points, iou_threshold: float
) -> SampledProposals:
    """The proposals that overlap their object by more than the threshold, if that is annotated."""
    boxes = torch.cat(sampled.boxes)
    overlap = box_iou(boxes, sampled.gt_boxes).diagonal() > iou_threshold
    annotated = [found is not None for found in matched_points(sampled, points)]
    annotated = upload(torch.tensor(annotated, dtype=torch.bool), boxes.device)
    return sampled.where(overlap & annotated)


class PackedPoints(NamedTuple):
    """All points of the proposals, each with its place in what is predicted for its proposal."""

    proposal: Tensor  # (P,) int64
    charts: Tensor  # (P,) int64, 0 for background
    u: Tensor  # (P,)
    v: Tensor
    grid_x: Tensor  # (P,), from 0 to S across the proposal
    grid_y: Tensor
    inside: Tensor  # (P,) bool, of the proposal

    def where(self, keep: Tensor) -> "PackedPoints":
        index = keep.nonzero()[:, 0]
        return PackedPoints(*(values[index] for values in self))


def pack_points(
    annotated: list[tuple[int, DensePosePoints]], boxes: Tensor, gt_boxes: Tensor, side: int
) -> PackedPoints:
    """Points relative to the boxes of their objects -> on the grids of their proposals.

    Args:
        annotated: (index of the proposal, its points), at least one.
        boxes, gt_boxes: (R, 4), of the proposals and of their objects.
        side: S.
    """
    # All points in one row, and the proposal of each.
    counts = torch.tensor([len(points.x) for _, points in annotated])
    indices = torch.tensor([index for index, _ in annotated])
    proposal = upload(indices.repeat_interleave(counts), boxes.device)
    x, y, charts, u, v = (
        torch.cat([getattr(points, name) for _, points in annotated])
        for name in ("x", "y", "charts", "u", "v")
    )

    # From the frame of the object's box to the image, and on to the frame of the proposal.
    corner, sides = boxes[proposal, :2], (boxes[:, 2:] - boxes[:, :2])[proposal]
    gt_corner, gt_sides = gt_boxes[proposal, :2], (gt_boxes[:, 2:] - gt_boxes[:, :2])[proposal]
    # In this order, that no point crosses the border of its proposal by rounding in one engine.
    offset = gt_corner + torch.stack([x, y], dim=1) * gt_sides / float(BOX_SIDE) - corner
    inside = ((offset >= 0) & (offset < sides)).all(dim=1)
    grid = offset * side / sides
    return PackedPoints(proposal, charts, u, v, grid[:, 0], grid[:, 1], inside)


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
    # The four cells around each point, and how near it is to the later ones.
    x_low, x_high, x_weight = _corners(points.grid_x, side)
    y_low, y_high, y_weight = _corners(points.grid_y, side)
    if isinstance(charts, slice):
        x_weight, y_weight = x_weight[:, None], y_weight[:, None]
    proposal = points.proposal
    return (
        maps[proposal, charts, y_low, x_low] * ((1 - x_weight) * (1 - y_weight))
        + maps[proposal, charts, y_low, x_high] * (x_weight * (1 - y_weight))
        + maps[proposal, charts, y_high, x_low] * ((1 - x_weight) * y_weight)
        + maps[proposal, charts, y_high, x_high] * (x_weight * y_weight)
    )


def resample_parts(parts: Tensor, gt_boxes: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Parts over the objects' boxes -> over the proposals: int64 (R, side, side).

    Cells are looked up at their upper left corners, the nearest pixel there; beyond the object's
    box is background. The box's far edges are the centres of its last pixels (Detectron2).

    Args:
        parts: uint8 (R, 256, 256).
        gt_boxes, boxes: (R, 4).
    """
    # Where a proposal begins and ends, from -1 to 1 across its object.
    gt_sides = gt_boxes[:, 2:] - gt_boxes[:, :2]
    begin = 2 * (boxes[:, :2] - gt_boxes[:, :2]) / gt_sides - 1
    size = boxes[:, 2:] - boxes[:, :2]
    end = 2 * (boxes[:, :2] + size - gt_boxes[:, :2]) / gt_sides - 1
    # The corners of the cells between, x and y of each in the last dimension: (R, side, side, 2).
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
            charts, summed over the points of all proposals and not divided by their number.
    """

    index_weight: float
    part_weight: float
    point_weight: float

    def __call__(self, predicted: Charts, sampled: SampledProposals, points: Points) -> Losses:
        """All are 0, and have gradients, where no annotated point is on a body and in a proposal.

        Args:
            predicted: for the R proposals of `sampled`, which `select_with_densepose` has kept.
            points: of the N images' objects.
        """
        indexed = enumerate(matched_points(sampled, points))
        annotated = [(i, found) for i, found in indexed if found is not None and len(found.x)]
        boxes = torch.cat(sampled.boxes)
        if annotated:
            packed = pack_points(annotated, boxes, sampled.gt_boxes, predicted.u.shape[-1])
            packed = packed.where(packed.inside)
        if not annotated or not (packed.charts > 0).any():
            maps = {"U": predicted.u, "V": predicted.v, "I": predicted.fine, "S": predicted.coarse}
            return {f"loss_densepose_{name}": x.sum() * 0 for name, x in maps.items()}
        parts_loss = self._parts_loss(predicted.coarse, annotated, boxes, sampled.gt_boxes)
        return self._point_losses(predicted, packed) | {"loss_densepose_S": parts_loss}

    def _point_losses(self, predicted: Charts, points: PackedPoints) -> Losses:
        # The chart of every point, background included; U and V of those on a body, on their chart.
        fine = values_at(predicted.fine, points, slice(None))  # (P, C)
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
        annotated: list[tuple[int, DensePosePoints]],
        boxes: Tensor,
        gt_boxes: Tensor,
    ) -> Tensor:
        """0 where one of the objects has no parts: Detectron2 then leaves out the others too."""
        if any(points.parts is None for _, points in annotated):
            return coarse.sum() * 0
        indices = upload(torch.tensor([index for index, _ in annotated]), boxes.device)
        parts = torch.stack([points.parts for _, points in annotated])
        target = resample_parts(parts, gt_boxes[indices], boxes[indices], coarse.shape[-1])
        if coarse.shape[1] == 2:  # person or not
            target = (target > 0).long()
        return F.cross_entropy(coarse[indices], target) * self.index_weight


# -- inference ------------------------------------------------------------------------------------


def surfaces(charts: Charts, boxes: Tensor) -> list[Tensor]:
    """Charts of D detections -> the surface at every pixel of their boxes (D, 4).

    As Detectron2's evaluator has it: the fields are resized to the box's width and height, rounded
    down to whole pixels (1 at least). A pixel is of the best chart, if the coarse segmentation is
    not of background; U and V are those on that chart.

    Returns:
        D tensors uint8 (3, height, width): chart (0 for background), U * 255, V * 255.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).long().clamp(min=1).tolist()
    return [
        _surface(charts[slice(i, i + 1)], (height, width))
        for i, (width, height) in enumerate(sides)
    ]


def _surface(charts: Charts, size: Size) -> Tensor:
    coarse, fine, u, v = (
        F.interpolate(x, size, mode="bilinear", align_corners=False)
        for x in (charts.coarse, charts.fine, charts.u, charts.v)
    )
    # The best chart where the coarse segmentation sees a person, else background (0).
    chart = fine.argmax(dim=1, keepdim=True) * (coarse.argmax(dim=1, keepdim=True) > 0)
    uv = torch.cat([u.gather(1, chart), v.gather(1, chart)], dim=1) * (chart > 0)
    return torch.cat([chart, (uv * 255).clamp(0, 255)], dim=1)[0].to(torch.uint8)


# -- from a config --------------------------------------------------------------------------------


def build_densepose_head(cfg, channels: int) -> DensePoseV1ConvXHead:
    """UserError where the config asks for a head that the native engine does not have."""
    head = cfg.MODEL.ROI_DENSEPOSE_HEAD
    if head.NAME != "DensePoseV1ConvXHead":
        raise UserError(
            f"MODEL.ROI_DENSEPOSE_HEAD.NAME {head.NAME!r}: set it to 'DensePoseV1ConvXHead'"
        )
    if head.DECODER_ON:
        raise UserError(
            "MODEL.ROI_DENSEPOSE_HEAD.DECODER_ON True: the native engine has no decoder over the "
            "pyramid; set it to False, or use --engine detectron2"
        )
    side, predicted = head.HEATMAP_SIZE, 2 * head.POOLER_RESOLUTION * head.UP_SCALE
    if side != predicted:
        raise UserError(
            f"MODEL.ROI_DENSEPOSE_HEAD.HEATMAP_SIZE is {side}, but 2 * POOLER_RESOLUTION * "
            f"UP_SCALE is {predicted}: make them equal"
        )
    return DensePoseV1ConvXHead(
        channels, head.NUM_STACKED_CONVS, head.CONV_HEAD_DIM, head.CONV_HEAD_KERNEL
    )


def build_densepose_predictor(cfg, channels: int) -> DensePoseChartPredictor:
    head = cfg.MODEL.ROI_DENSEPOSE_HEAD
    return DensePoseChartPredictor(
        channels, head.NUM_COARSE_SEGM_CHANNELS, head.DECONV_KERNEL, head.UP_SCALE
    )


def build_densepose_loss(cfg) -> DensePoseChartLoss:
    head = cfg.MODEL.ROI_DENSEPOSE_HEAD
    return DensePoseChartLoss(head.INDEX_WEIGHTS, head.PART_WEIGHTS, head.POINT_REGRESSION_WEIGHTS)
