"""Pure box arithmetic, shared by the RPN and the ROI heads; no module, no state.

A box is (x0, y0, x1, y1) in pixels of the network's input image, in continuous coordinates: its
width is x1 - x0 (Detectron2's convention, no "+ 1").

Shapes: N boxes to be labelled (anchors or proposals), M ground-truth boxes.
"""

import math

import torch
from torch import Tensor
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

    dw and dh are clamped to `SCALE_CLAMP`. Computed in float32 whatever the deltas' type.
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


def match(
    iou: Tensor,
    thresholds: list[float],
    labels: list[int],
    allow_low_quality_matches: bool,
) -> tuple[Tensor, Tensor]:
    """Give each of N boxes its best ground truth and a label, from their IoU (M, N).

    A box with thresholds[i - 1] <= best IoU < thresholds[i] gets labels[i]; the RPN has thresholds
    (.3, .7) and labels (0, -1, 1) for background, ignored, object.

    With `allow_low_quality_matches`, the boxes that overlap a ground truth most (all of them, in
    a tie) are objects too, so that no ground truth is left without a box (Faster R-CNN, section
    3.1.2, case i). As in Detectron2 such a box keeps the ground truth that *it* overlaps most.

    Returns the index of the ground truth (N,) int64, and the label (N,) int8. Without ground truth
    (M = 0) the index is 0 and the label labels[0].
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


def subsample(
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
