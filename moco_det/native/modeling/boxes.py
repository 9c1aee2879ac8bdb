"""Boxes: their arithmetic, and which of them the losses are computed on.

    encode, decode       boxes relative to others, and back
    match                with the targets, by overlap
    subsample_labels     of the matched, those that are drawn: for the RPN, and in
    ProposalSampler      for the ROI heads

A box is (x0, y0, x1, y1) in pixels of the network's input image, in continuous coordinates: its
width is x1 - x0 (Detectron2's convention, no "+ 1").

Shapes: N images or boxes, Ri proposals in image i, R = sum(Ri), K classes (the label K is
background), Gi objects in image i, P keypoints of an object. In `match`, of one image, B boxes to
be labelled (anchors or proposals) and G objects.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from moco_det.densepose.points import DensePosePoints

# A predicted box is at most 1000 / 16 times as large as the box it refines (Detectron, Detectron2):
# keeps exp() finite at the start of training.
SCALE_CLAMP = math.log(1000.0 / 16)

Size = tuple[int, int]  # of an image: height, width
Losses = dict[str, Tensor]  # by Detectron2's names

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
    """Intersection over union, (G, 4) x (B, 4) -> (G, B); 0 where both boxes are empty."""
    return box_iou(gt_boxes, boxes).nan_to_num_(0)


# -- matching and drawing -------------------------------------------------------------------------


def match(
    iou: Tensor,
    thresholds: list[float],
    labels: list[int],
    allow_low_quality_matches: bool,
) -> tuple[Tensor, Tensor]:
    """Give each of B boxes its best ground truth and a label, from their IoU (G, B).

    A box with thresholds[i - 1] <= best IoU < thresholds[i] gets labels[i]; the RPN has thresholds
    (.3, .7) and labels (0, -1, 1) for background, ignored, object.

    With `allow_low_quality_matches`, the boxes that overlap a ground truth most (all of them, in
    a tie) are objects too, so that no ground truth is left without a box (Faster R-CNN, section
    3.1.2, case i). As in Detectron2 such a box keeps the ground truth that *it* overlaps most.

    Returns the index of the ground truth (B,) int64, and the label (B,) int8. Without ground truth
    (G = 0) the index is 0 and the label labels[0].
    """
    num_boxes = iou.shape[1]
    result = torch.full((num_boxes,), labels[0], dtype=torch.int8, device=iou.device)
    if iou.shape[0] == 0:
        return torch.zeros(num_boxes, dtype=torch.int64, device=iou.device), result
    best, matched = iou.max(dim=0)
    for threshold, label in zip(thresholds, labels[1:], strict=True):
        result[best >= threshold] = label
    if allow_low_quality_matches:
        best_of_each_gt = iou.max(dim=1, keepdim=True).values
        result[(iou == best_of_each_gt).any(dim=0)] = 1
    return matched, result


def subsample_labels(
    labels: Tensor, num_samples: int, positive_fraction: float, background: int
) -> tuple[Tensor, Tensor]:
    """Draw the boxes that a loss is computed on: (indices of positives, indices of negatives).

    At most `positive_fraction * num_samples` positives (labels neither -1 nor `background`), then
    as many negatives as fill up `num_samples`. Labels -1 are never drawn.

    The draws are one `torch.randperm` over the positives, then one over the negatives, on the
    labels' device: Detectron2's, so that one seed samples the same boxes in both engines.
    """
    positive = ((labels != -1) & (labels != background)).nonzero().squeeze(1)
    negative = (labels == background).nonzero().squeeze(1)
    num_positive = min(positive.numel(), int(num_samples * positive_fraction))
    num_negative = min(negative.numel(), num_samples - num_positive)
    chosen_positive = torch.randperm(positive.numel(), device=labels.device)[:num_positive]
    chosen_negative = torch.randperm(negative.numel(), device=labels.device)[:num_negative]
    return positive[chosen_positive], negative[chosen_negative]


# -- proposals for the ROI heads ------------------------------------------------------------------

# Of one image: polygons for each object, each [x0, y0, x1, y1, ...] float64; or a bool (Gi, H, W).
Masks = list[list[np.ndarray]] | Tensor


class Targets(NamedTuple):
    """The objects of a batch, in pixels of the network's input."""

    boxes: list[Tensor]  # N tensors (Gi, 4)
    classes: list[Tensor]  # N tensors (Gi,)
    masks: list[Masks] | None = None
    keypoints: list[Tensor] | None = None  # N tensors (Gi, P, 3): x, y, visibility
    densepose: list[list[DensePosePoints | None]] | None = None  # None: not annotated


class SampledProposals(NamedTuple):
    """Proposals to train on, each labelled by its object."""

    boxes: list[Tensor]  # N tensors (Ri, 4)
    classes: Tensor  # (R,), K for background
    gt_boxes: Tensor  # (R, 4), meaningless for background
    matched: list[Tensor]  # N tensors (Ri,), the object's index in its image; likewise

    def where(self, keep: Tensor) -> "SampledProposals":
        """The proposals for which `keep`, bool (R,), is true."""
        of_image = keep.split([len(boxes) for boxes in self.boxes])
        return SampledProposals(
            [boxes[kept] for boxes, kept in zip(self.boxes, of_image, strict=True)],
            self.classes[keep],
            self.gt_boxes[keep],
            [index[kept] for index, kept in zip(self.matched, of_image, strict=True)],
        )


@dataclass(frozen=True)
class ProposalSampler:
    """Labels proposals by their overlap with the objects, and draws a batch from each image's.

    Args:
        num_classes: K.
        iou_thresholds, iou_labels: see `match`.
        batch_size_per_image, positive_fraction: see `subsample_labels`.
        append_gt: propose the objects' own boxes too, or there are no positives at the start.
    """

    num_classes: int
    iou_thresholds: list[float]
    iou_labels: list[int]
    batch_size_per_image: int
    positive_fraction: float
    append_gt: bool

    @torch.no_grad()
    def __call__(self, proposals: list[Tensor], targets: Targets) -> SampledProposals:
        """N tensors of proposals (any number, 4) -> those to train on."""
        sampled = [
            self._sample_image(*image)
            for image in zip(proposals, targets.boxes, targets.classes, strict=True)
        ]
        boxes, classes, gt_boxes, matched = zip(*sampled, strict=True)
        return SampledProposals(list(boxes), torch.cat(classes), torch.cat(gt_boxes), list(matched))

    def _sample_image(
        self, proposals: Tensor, gt_boxes: Tensor, gt_classes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        boxes = torch.cat([proposals, gt_boxes]) if self.append_gt else proposals
        # Each box gets the class and the box of the object that it overlaps most.
        iou = pairwise_iou(gt_boxes, boxes)
        matched, labels = match(
            iou, self.iou_thresholds, self.iou_labels, allow_low_quality_matches=False
        )
        if len(gt_boxes):
            classes, matched_boxes = gt_classes[matched], gt_boxes[matched]
            classes[labels == 0] = self.num_classes
            classes[labels == -1] = -1
        else:
            classes, matched_boxes = torch.full_like(matched, self.num_classes), boxes
        # Positives first, then background.
        chosen = torch.cat(
            subsample_labels(
                classes, self.batch_size_per_image, self.positive_fraction, self.num_classes
            )
        )
        return boxes[chosen], classes[chosen], matched_boxes[chosen], matched[chosen]


def build_proposal_sampler(cfg) -> ProposalSampler:
    heads = cfg.MODEL.ROI_HEADS
    return ProposalSampler(
        num_classes=heads.NUM_CLASSES,
        iou_thresholds=heads.IOU_THRESHOLDS,
        iou_labels=heads.IOU_LABELS,
        batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
        positive_fraction=heads.POSITIVE_FRACTION,
        append_gt=heads.PROPOSAL_APPEND_GT,
    )
