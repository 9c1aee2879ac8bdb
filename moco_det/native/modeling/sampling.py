"""Which regions the heads are trained on.

Shapes: N images, Ri regions in image i, R = sum(Ri), K classes (the label K is background),
Gi ground-truth objects in image i, P keypoints of an object.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moco_det.densepose.points import DensePosePoints
from moco_det.native.modeling.boxes import match, pairwise_iou, subsample

# Of one image: polygons for each object, each [x0, y0, x1, y1, ...] float64; or a bool (Gi, H, W).
Masks = list[list[np.ndarray]] | Tensor


class Targets(NamedTuple):
    """The objects of a batch, in pixels of the network's input."""

    boxes: list[Tensor]  # N tensors (Gi, 4)
    classes: list[Tensor]  # N tensors (Gi,)
    masks: list[Masks] | None = None
    keypoints: list[Tensor] | None = None  # N tensors (Gi, P, 3): x, y, visibility
    densepose: list[list[DensePosePoints | None]] | None = None  # None: not annotated


class RegionSamples(NamedTuple):
    """Regions to train on."""

    boxes: list[Tensor]  # N tensors (Ri, 4)
    classes: Tensor  # (R,), K for background
    gt_boxes: Tensor  # (R, 4), meaningless for background
    matched: list[Tensor]  # N tensors (Ri,), the object's index in its image; likewise

    def where(self, keep: Tensor) -> "RegionSamples":
        """The regions for which `keep`, bool (R,), is true."""
        of_image = keep.split([len(boxes) for boxes in self.boxes])
        return RegionSamples(
            [boxes[kept] for boxes, kept in zip(self.boxes, of_image, strict=True)],
            self.classes[keep],
            self.gt_boxes[keep],
            [index[kept] for index, kept in zip(self.matched, of_image, strict=True)],
        )


@dataclass(frozen=True)
class RegionSampler:
    """Labels proposals by their overlap with the ground truth and draws a batch of each image's."""

    num_classes: int
    iou_thresholds: list[float]
    iou_labels: list[int]
    batch_size_per_image: int
    positive_fraction: float
    append_gt: bool  # ground truth is proposed too, or there are no positives at the start

    @torch.no_grad()
    def __call__(self, proposals: list[Tensor], truth: Targets) -> RegionSamples:
        samples = [
            self._sample_image(*image)
            for image in zip(proposals, truth.boxes, truth.classes, strict=True)
        ]
        boxes, classes, targets, matched = zip(*samples, strict=True)
        return RegionSamples(list(boxes), torch.cat(classes), torch.cat(targets), list(matched))

    def _sample_image(
        self, proposals: Tensor, gt_boxes: Tensor, gt_classes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        boxes = torch.cat([proposals, gt_boxes]) if self.append_gt else proposals
        iou = pairwise_iou(gt_boxes, boxes)
        matched, labels = match(
            iou, self.iou_thresholds, self.iou_labels, allow_low_quality_matches=False
        )
        if len(gt_boxes):
            classes, targets = gt_classes[matched], gt_boxes[matched]
            classes[labels == 0] = self.num_classes
            classes[labels == -1] = -1
        else:
            classes, targets = torch.full_like(matched, self.num_classes), boxes
        chosen = torch.cat(
            subsample(classes, self.batch_size_per_image, self.positive_fraction, self.num_classes)
        )
        return boxes[chosen], classes[chosen], targets[chosen], matched[chosen]


def build_sampler(cfg) -> RegionSampler:
    heads = cfg.MODEL.ROI_HEADS
    return RegionSampler(
        num_classes=heads.NUM_CLASSES,
        iou_thresholds=heads.IOU_THRESHOLDS,
        iou_labels=heads.IOU_LABELS,
        batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
        positive_fraction=heads.POSITIVE_FRACTION,
        append_gt=heads.PROPOSAL_APPEND_GT,
    )
