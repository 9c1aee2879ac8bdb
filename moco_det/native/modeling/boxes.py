"""Boxes: their arithmetic, and which of them the losses are computed on.

    encode, decode       boxes relative to others, and back
    batched_nms          of those that overlap, the best
    match                with the targets, by overlap
    subsample_labels     of the matched, those that are drawn: for the RPN, and in
    ProposalSampler      for the ROI heads

On a GPU the host waits for the device only where it needs a number of boxes, and then for those of
all images at once.

A box is (x0, y0, x1, y1) in pixels of the network's input image, in continuous coordinates: its
width is x1 - x0 (Detectron2's convention, no "+ 1").

Shapes: N images or boxes, Ri proposals in image i, R = sum(Ri), K classes (the label K is
background), Gi objects in image i, P keypoints of an object. In `match`, of one image, B boxes to
be labelled (anchors or proposals) and G objects.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou

from moco_det.densepose.points import DensePosePoints
from moco_det.native.modeling.layers import on_gpu

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


# -- of many boxes, some --------------------------------------------------------------------------


def group(groups: Tensor, num_groups: int) -> tuple[Tensor, list[int]]:
    """The order (B,) in which members of a group stand together, and the size of each group.

    groups: (B,), from 0 to `num_groups` - 1. Members keep their order.
    """
    if num_groups == 1:  # nothing that the host would have to ask for
        return torch.arange(len(groups), device=groups.device), [len(groups)]
    members = groups == torch.arange(num_groups, device=groups.device)[:, None]
    return groups.argsort(stable=True), members.sum(1).tolist()


def positions(kept: Tensor) -> list[Tensor]:
    """Where each row of a mask (N, B) is true: N tensors of indices, in their order."""
    counts = kept.sum(1).tolist()
    true_first = kept.logical_not().byte().argsort(dim=1, stable=True)
    return [row[:count] for row, count in zip(true_first, counts, strict=True)]


def best_of_each(scores: Sequence[Tensor], kept: Sequence[Tensor], most: int) -> list[Tensor]:
    """The indices of each image's `kept` boxes, best first; of equal ones the first is the better.

    Args:
        scores, kept: N tensors (Bi,) each, the latter bool.
        most: so many of them at most; -1 for all.
    """
    # As tables of N rows, the shorter ones filled up with boxes that are not kept.
    scores, kept = (pad_sequence(list(x), batch_first=True) for x in (scores, kept))
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = kept.gather(1, order)
    if most >= 0:
        kept = kept & (kept.cumsum(1) <= most)
    return [row[index] for row, index in zip(order, positions(kept), strict=True)]


# NMS compares each box with each: of more boxes than these, one image at a time.
MOST_AT_ONCE = 25_000


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    num_groups: int,
    counts: Sequence[int],
    iou_threshold: float,
) -> Tensor:
    """Which boxes are left when none overlaps a better one of its image and group: bool (B,).

    On a GPU in one go for several images, elsewhere image by image.

    Args:
        boxes: (B, 4), those of the first image first, with no negative coordinates.
        scores: (B,); of equal ones the first is the better.
        groups: (B,), from 0 to `num_groups` - 1; levels or classes.
        counts: how many boxes each image has.
        iou_threshold: they overlap if their IoU is greater.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    begin, most = 0, MOST_AT_ONCE if on_gpu(boxes) else 0
    for images in _images_at_once(counts, most):
        end = begin + sum(images)
        some = boxes[begin:end], scores[begin:end], groups[begin:end]
        if end - begin > most:
            best = torchvision.ops.batched_nms(*some, iou_threshold)
        else:
            image = torch.cat([groups.new_full((n,), i) for i, n in enumerate(images)])
            spread = spread_apart(some[0], image * num_groups + some[2], len(images) * num_groups)
            best = torchvision.ops.nms(spread, some[1], iou_threshold)
        kept[begin:end].index_fill_(0, best, True)
        begin = end
    return kept


def _images_at_once(counts: Sequence[int], most: int) -> Iterator[list[int]]:
    """The counts of successive images, in lists of one or of a sum of at most `most`."""
    images: list[int] = []
    for count in counts:
        if images and sum(images) + count > most:
            yield images
            images = []
        images.append(count)
    if images:
        yield images


def spread_apart(boxes: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Boxes (B, 4) moved so that those of different groups do not touch.

    The groups lie in a square around 0 rather than in a row: the smaller the coordinates are, the
    finer is float32. 80 classes of 16 images are within 18 image sides, where single steps are
    1 / 512 of a pixel.
    """
    if not len(boxes):
        return boxes
    side = math.ceil(math.sqrt(num_groups))
    column, row = groups % side - side // 2, groups // side - side // 2
    cell = boxes.max() + 1
    return boxes + torch.stack([column, row, column, row], dim=1) * cell


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
        result.masked_fill_(best >= threshold, label)
    if allow_low_quality_matches:
        best_of_each_gt = iou.max(dim=1, keepdim=True).values
        result.masked_fill_((iou == best_of_each_gt).any(dim=0), 1)
    return matched, result


def subsample_labels(
    labels: Sequence[Tensor], num_samples: int, positive_fraction: float, background: int
) -> list[tuple[Tensor, Tensor]]:
    """Draw the boxes that a loss is computed on: of each image its positives and its negatives.

    At most `positive_fraction * num_samples` positives (labels neither -1 nor `background`), then
    as many negatives as fill up `num_samples`. Labels -1 are never drawn.

    The draws are, image by image, one `torch.randperm` over the positives, then one over the
    negatives, on the labels' device: Detectron2's, so that one seed samples the same boxes in both
    engines.

    Args:
        labels: N tensors (Bi,).

    Returns:
        N pairs of indices.
    """
    # Of each image two masks, (2, Bi): positives, negatives.
    kinds = [torch.stack([(x != -1) & (x != background), x == background]) for x in labels]
    counts = torch.stack([kind.sum(1) for kind in kinds]).tolist()
    most_positives = int(num_samples * positive_fraction)
    drawn = []
    for kind, (num_positive, num_negative) in zip(kinds, counts, strict=True):
        take = min(num_positive, most_positives)
        chosen = (
            torch.randperm(num_positive, device=kind.device)[:take],
            torch.randperm(num_negative, device=kind.device)[: num_samples - take],
        )
        # The n-th of a mask is where so many are counted for the first time.
        numbered = kind.cumsum(1)
        drawn.append(tuple(map(torch.searchsorted, numbered, (n + 1 for n in chosen))))
    return drawn


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

    def indices(self, keep: Tensor) -> list[Tensor]:
        """Where `keep`, bool (R,), is true: of each image, in the order (R,)."""
        sizes = [len(boxes) for boxes in self.boxes]
        counts = torch.stack([of_image.sum() for of_image in keep.split(sizes)]).tolist()
        true_first = keep.logical_not().byte().argsort(stable=True)
        return list(true_first[: sum(counts)].split(counts))

    def take(self, indices: list[Tensor]) -> "SampledProposals":
        """The proposals of these `indices`."""
        counts, index = [len(i) for i in indices], torch.cat(indices)
        return SampledProposals(
            list(torch.cat(self.boxes)[index].split(counts)),
            self.classes[index],
            self.gt_boxes[index],
            list(torch.cat(self.matched)[index].split(counts)),
        )

    def where(self, keep: Tensor) -> "SampledProposals":
        """The proposals for which `keep`, bool (R,), is true."""
        return self.take(self.indices(keep))

    def on_host(self) -> "SampledProposals":
        """The same on the CPU, by one copy."""
        counts = [len(boxes) for boxes in self.boxes]
        numbers = torch.stack([self.classes, torch.cat(self.matched)], dim=1)
        values = torch.cat([torch.cat(self.boxes), self.gt_boxes, numbers], dim=1).cpu()
        boxes, gt_boxes, classes, matched = values.split([4, 4, 1, 1], dim=1)
        return SampledProposals(
            list(boxes.split(counts)),
            classes[:, 0].long(),
            gt_boxes,
            list(matched[:, 0].long().split(counts)),
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
        if self.append_gt:
            proposals = [torch.cat(pair) for pair in zip(proposals, targets.boxes, strict=True)]
        labelled = [
            self._label_image(*image)
            for image in zip(proposals, targets.boxes, targets.classes, strict=True)
        ]
        drawn = subsample_labels(
            [classes for classes, _, _ in labelled],
            self.batch_size_per_image,
            self.positive_fraction,
            self.num_classes,
        )
        # Of each image positives first, then background.
        drawn = [torch.cat(pair) for pair in drawn]
        boxes = [of_image[index] for of_image, index in zip(proposals, drawn, strict=True)]
        sampled = [
            [values[index] for values in of_image]
            for of_image, index in zip(labelled, drawn, strict=True)
        ]
        classes, gt_boxes, matched = zip(*sampled, strict=True)
        return SampledProposals(boxes, torch.cat(classes), torch.cat(gt_boxes), list(matched))

    def _label_image(
        self, boxes: Tensor, gt_boxes: Tensor, gt_classes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the object that each box overlaps most the class, the box and the index."""
        iou = pairwise_iou(gt_boxes, boxes)
        matched, labels = match(
            iou, self.iou_thresholds, self.iou_labels, allow_low_quality_matches=False
        )
        if not len(gt_boxes):
            return torch.full_like(matched, self.num_classes), boxes, matched
        classes = gt_classes[matched].masked_fill_(labels == 0, self.num_classes)
        return classes.masked_fill_(labels == -1, -1), gt_boxes[matched], matched


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
