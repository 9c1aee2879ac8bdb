"""Region Proposal Network (Ren et al. 2015): anchors, the head on them, proposals and losses.

Shapes: N images, L feature maps of size Hi x Wi with C channels, A anchors per position,
R = sum(Hi * Wi * A) anchors per image, S sampled anchors, Gi ground-truth boxes in image i.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from moco_det.common.errors import UserError
from moco_det.native.modeling.backbones import feature_strides
from moco_det.native.modeling.boxes import (
    Losses,
    Size,
    Weights,
    batched_nms,
    best_of_each,
    decode,
    encode,
    group,
    match,
    nonempty,
    pairwise_iou,
    subsample_labels,
)
from moco_det.native.modeling.layers import ConvNorm

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
        # Of each level the anchors (H, W, A, 4) of the largest map so far.
        self._grids: list[Tensor | None] = [None] * len(strides)

    def _cell(self, level: int) -> Tensor:
        return getattr(self, f"cell{level}")

    def _grid(self, level: int, height: int, width: int) -> Tensor:
        """(H, W, A, 4) of at least this height and width."""
        cell, grid = self._cell(level), self._grids[level]
        if grid is None or grid.device != cell.device or grid.dtype != cell.dtype:
            known = 0, 0
        else:
            known = grid.shape[:2]
        if height > known[0] or width > known[1]:
            height, width = max(height, known[0]), max(width, known[1])
            y = (torch.arange(height, device=cell.device) + self.offset) * self.strides[level]
            x = (torch.arange(width, device=cell.device) + self.offset) * self.strides[level]
            y, x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=-1)
            self._grids[level] = grid = shifts[:, :, None] + cell
        return grid

    @property
    def num_anchors(self) -> int:
        """Anchors per position; the RPN's head is shared, so every level must have the same."""
        counts = {len(self._cell(level)) for level in range(len(self.strides))}
        if len(counts) != 1:
            raise ValueError(f"feature maps with different numbers of anchors: {sorted(counts)}")
        return counts.pop()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Feature maps (N, C, Hi, Wi) -> anchors (Hi * Wi * A, 4): rows, columns, then A."""
        sizes = [feature.shape[-2:] for feature in features]
        return [
            self._grid(level, height, width)[:height, :width].reshape(-1, 4)
            for level, (height, width) in enumerate(sizes)
        ]


# -- the network ----------------------------------------------------------------------------------


class RPNHead(nn.Module):
    """A 3x3 convolution, then 1x1 ones for objectness and box deltas; shared by all levels."""

    def __init__(self, channels: int, num_anchors: int):
        super().__init__()
        self.conv = ConvNorm(channels, channels, 3)
        self.objectness_logits = nn.Conv2d(channels, num_anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, num_anchors * 4, 1)
        for layer in (self.conv, self.objectness_logits, self.anchor_deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """L maps (N, C, Hi, Wi) -> L logits (N, A, Hi, Wi), L deltas (N, 4A, Hi, Wi)."""
        hidden = [F.relu_(self.conv(x)) for x in features]
        return [self.objectness_logits(t) for t in hidden], [self.anchor_deltas(t) for t in hidden]

    def forward_sampled(
        self, features: list[Tensor], images: Sequence[Tensor], indices: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What `forward` gives for single anchors, at the cost of these alone.

        Args:
            features: L maps (N, C, Hi, Wi).
            images: of each level the images of its anchors, L tensors (Si,), S = sum(Si).
            indices: their indices, counted in the order (Hi, Wi, A); likewise.

        Returns:
            logits (S,) and deltas (S, 4), level after level.
        """
        num_anchors = self.objectness_logits.out_channels
        levels = zip(features, images, indices, strict=True)
        patches = torch.cat([patches_around(x, n, i // num_anchors) for x, n, i in levels])

        # The 3x3 convolution as a matrix product, then the 1x1 ones.
        weight = self.conv.weight.permute(0, 2, 3, 1)
        hidden = F.relu_(F.linear(patches.flatten(1), weight.flatten(1), self.conv.bias))
        hidden = hidden[:, :, None, None]  # (S, C, 1, 1)

        # Of the A anchors at each position, the one that was asked for.
        anchor = torch.cat(list(indices)) % num_anchors
        chosen = torch.arange(len(anchor), device=anchor.device), anchor
        deltas = self.anchor_deltas(hidden).view(len(anchor), num_anchors, 4)
        return self.objectness_logits(hidden).flatten(1)[chosen], deltas[chosen]


def patches_around(feature: Tensor, image: Tensor, position: Tensor) -> Tensor:
    """(S, 3, 3, C): what a 3x3 convolution sees of a map (N, C, H, W) at single positions.

    image, position: (S,), the latter counted in the order (H, W). Beyond the map is 0.
    """
    height, width = feature.shape[2:]
    offset = torch.arange(3, device=position.device) - 1
    row = (position // width)[:, None, None] + offset[:, None]  # (S, 3, 1)
    column = (position % width)[:, None, None] + offset  # (S, 1, 3)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
    return feature[image[:, None, None], :, row, column] * inside[..., None]


class RPN(nn.Module):
    """Scores and refines anchors; the best, after NMS, are the proposals of the ROI heads.

    Args:
        head, anchor_generator, in_features: the maps it runs on, and what runs on them.
        iou_thresholds, iou_labels: see `boxes.match`.
        batch_size_per_image, positive_fraction: see `boxes.subsample_labels`.
        box_weights: see `boxes.encode`.
        smooth_l1_beta: where the box loss turns from L2 to L1, in deltas; 0 is L1.
        loss_weights: factors of the losses, by name.
        pre_nms_topk: boxes kept per level before NMS, (training, inference).
        post_nms_topk: proposals per image, over all levels, (training, inference).
        nms_thresh: IoU from which the lower-scored box of one level is dropped.
        min_box_size: proposals with a side this short are dropped, pixels.
    """

    def __init__(
        self,
        head: RPNHead,
        anchor_generator: AnchorGenerator,
        *,
        in_features: list[str],
        iou_thresholds: list[float],
        iou_labels: list[int],
        batch_size_per_image: int,
        positive_fraction: float,
        box_weights: Weights,
        smooth_l1_beta: float,
        loss_weights: dict[str, float],
        pre_nms_topk: tuple[int, int],
        post_nms_topk: tuple[int, int],
        nms_thresh: float,
        min_box_size: float,
    ):
        super().__init__()
        self.rpn_head = head
        self.anchor_generator = anchor_generator
        self.in_features = tuple(in_features)
        self.iou_thresholds = list(iou_thresholds)
        self.iou_labels = list(iou_labels)
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.box_weights = box_weights
        self.smooth_l1_beta = smooth_l1_beta
        self.loss_weights = loss_weights
        self.pre_nms_topk = pre_nms_topk
        self.post_nms_topk = post_nms_topk
        self.nms_thresh = nms_thresh
        self.min_box_size = min_box_size

    def forward(
        self,
        features: dict[str, Tensor],
        image_sizes: list[Size],
        gt_boxes: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], Losses]:
        """
        Args:
            features: maps by name, (N, C, Hi, Wi).
            image_sizes: (height, width) of each image without its padding.
            gt_boxes: N tensors (Gi, 4); in training only.

        Returns:
            N tensors (at most post_nms_topk, 4) of proposals, best first, without gradient; and,
            in training, the losses `loss_rpn_cls` and `loss_rpn_loc`.
        """
        # Without gradient: proposals take none, and the losses need only that of the samples.
        with torch.no_grad():
            anchors, logits, deltas = self.predict(features)
        # The losses first: they draw random numbers before the ROI heads do.
        losses = self.losses(features, anchors, gt_boxes) if self.training else {}
        return self.propose(anchors, logits, deltas, image_sizes)[0], losses

    def predict(
        self, features: dict[str, Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level, i from 1 to L: anchors (Hi*Wi*A, 4), logits (N, Hi*Wi*A), deltas (N, ., 4)."""
        maps = [features[name] for name in self.in_features]
        logits, deltas = self.rpn_head(maps)
        # (N, A, Hi, Wi) -> (N, Hi*Wi*A) and (N, A*4, Hi, Wi) -> (N, Hi*Wi*A, 4), as the anchors.
        logits = [x.permute(0, 2, 3, 1).flatten(1).float() for x in logits]
        deltas = [
            x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3).float() for x in deltas
        ]
        return self.anchor_generator(maps), logits, deltas

    @torch.no_grad()
    def sample_anchors(
        self, anchors: Tensor, gt_boxes: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The anchors (R, 4) that the losses are computed on, objects first.

        Returns:
            the image and the index of each, (S,) int64, and of the first P of them, which are on
            objects, the objects' boxes (P, 4).
        """
        labelled = [
            match(pairwise_iou(boxes, anchors), self.iou_thresholds, self.iou_labels, True)
            for boxes in gt_boxes
        ]
        labels = [label for _, label in labelled]
        drawn = subsample_labels(
            labels, self.batch_size_per_image, self.positive_fraction, background=0
        )
        positive, negative = zip(*drawn, strict=True)
        targets = [
            boxes[matched[index]]
            for boxes, (matched, _), index in zip(gt_boxes, labelled, positive, strict=True)
        ]
        # The image of each, all positives first.
        numbered = enumerate((*positive, *negative))
        image = torch.cat([torch.full_like(index, i % len(gt_boxes)) for i, index in numbered])
        return image, torch.cat([*positive, *negative]), torch.cat(targets)

    def losses(
        self, features: dict[str, Tensor], anchors: list[Tensor], gt_boxes: list[Tensor]
    ) -> Losses:
        """Objectness on all sampled anchors, boxes on the positive ones.

        The head runs on the samples alone, some hundreds of the 10^5 anchors of a pyramid: their
        gradient is all the gradient there is.

        Both are sums divided by batch_size_per_image * N, the number of samples asked for rather
        than found: Detectron2's normalisation.
        """
        all_anchors = torch.cat(anchors)  # (R, 4)
        image, index, targets = self.sample_anchors(all_anchors, gt_boxes)
        logits, deltas = self._predict_sampled(features, [len(x) for x in anchors], image, index)

        # Objectness on all of them (S,), boxes on those of objects (P, 4), which come first.
        num_positive = len(targets)
        label = (torch.arange(len(index), device=index.device) < num_positive).float()
        target_deltas = encode(all_anchors[index[:num_positive]], targets, self.box_weights)
        losses = {
            "loss_rpn_cls": F.binary_cross_entropy_with_logits(logits, label, reduction="sum"),
            "loss_rpn_loc": F.smooth_l1_loss(
                deltas[:num_positive], target_deltas, beta=self.smooth_l1_beta, reduction="sum"
            ),
        }
        normaliser = self.batch_size_per_image * len(gt_boxes)
        return {k: v / normaliser * self.loss_weights[k] for k, v in losses.items()}

    def _predict_sampled(
        self, features: dict[str, Tensor], sizes: list[int], image: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits (S,) and deltas (S, 4) of anchors, the head being run on these alone.

        Args:
            sizes: how many anchors each level has.
            image, index: (S,), see `sample_anchors`.
        """
        begins = [sum(sizes[:level]) for level in range(len(sizes))]
        # Level by level, then back into the order of the samples.
        level_of = sum((index >= begin).long() for begin in begins) - 1
        order, counts = group(level_of, len(sizes))
        image, index = image[order].split(counts), index[order].split(counts)
        index = [of_level - begin for of_level, begin in zip(index, begins, strict=True)]
        maps = [features[name] for name in self.in_features]
        logits, deltas = self.rpn_head.forward_sampled(maps, image, index)
        back = order.argsort()
        return logits[back].float(), deltas[back].float()

    @torch.no_grad()
    def propose(
        self,
        anchors: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor],
        image_sizes: list[Size],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The best anchors of each level, refined, clipped, and thinned out by NMS within a level.

        Returns boxes, N tensors (at most post_nms_topk, 4), and their logits, both best first.
        Boxes that are not finite are dropped (the loss shows them: it is not finite either).
        """
        phase = 0 if self.training else 1
        # The k best of each level, over all images at once: M of all levels.
        best = []
        for level, (anchor, logit, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
            score, index = logit.topk(min(self.pre_nms_topk[phase], logit.shape[1]), dim=1)
            delta = delta.gather(1, index[..., None].expand(-1, -1, 4))
            best.append((score, delta, anchor[index], torch.full_like(index, level)))
        # (N, M), (N, M, 4), (N, M, 4), (N, M)
        scores, deltas, anchors, levels = (torch.cat(x, 1) for x in zip(*best, strict=True))

        # Only these are decoded: the result is that of decoding all of them.
        boxes = decode(deltas, anchors, self.box_weights)
        valid = boxes.isfinite().all(dim=2) & scores.isfinite()
        pairs = zip(boxes, image_sizes, strict=True)
        boxes = torch.stack([clip_boxes_to_image(of_image, size) for of_image, size in pairs])
        valid &= nonempty(boxes, self.min_box_size)
        # Those that are not valid stay in their places, as boxes that overlap none and come last.
        boxes = boxes.masked_fill(~valid[..., None], 0)
        scores = scores.masked_fill(~valid, -torch.inf)

        # NMS within each level of each image; then, image by image, the best of all levels.
        kept = batched_nms(
            boxes.flatten(0, 1),
            scores.flatten(),
            levels.flatten(),
            len(logits),
            [boxes.shape[1]] * len(boxes),
            self.nms_thresh,
        )
        kept = kept.view_as(valid) & valid
        chosen = best_of_each(scores, kept, self.post_nms_topk[phase])
        return (
            [of_image[index] for of_image, index in zip(boxes, chosen, strict=True)],
            [of_image[index] for of_image, index in zip(scores, chosen, strict=True)],
        )


def build_rpn(cfg, backbone: nn.Module) -> RPN:
    """Raises UserError where features, anchors and backbone do not fit each other."""
    rpn, anchors = cfg.MODEL.RPN, cfg.MODEL.ANCHOR_GENERATOR
    strides = feature_strides(backbone, rpn.IN_FEATURES, "MODEL.RPN.IN_FEATURES")
    try:
        generator = AnchorGenerator(anchors.SIZES, anchors.ASPECT_RATIOS, strides, anchors.OFFSET)
        num_anchors = generator.num_anchors
    except ValueError as error:
        raise UserError(f"MODEL.ANCHOR_GENERATOR: {error}; see MODEL.RPN.IN_FEATURES") from error
    return RPN(
        RPNHead(backbone.channels[rpn.IN_FEATURES[0]], num_anchors),
        generator,
        in_features=rpn.IN_FEATURES,
        iou_thresholds=rpn.IOU_THRESHOLDS,
        iou_labels=rpn.IOU_LABELS,
        batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
        positive_fraction=rpn.POSITIVE_FRACTION,
        box_weights=rpn.BBOX_REG_WEIGHTS,
        smooth_l1_beta=rpn.SMOOTH_L1_BETA,
        loss_weights={
            "loss_rpn_cls": rpn.LOSS_WEIGHT,
            "loss_rpn_loc": rpn.LOSS_WEIGHT * rpn.BBOX_REG_LOSS_WEIGHT,
        },
        pre_nms_topk=(rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
        post_nms_topk=(rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
        nms_thresh=rpn.NMS_THRESH,
        min_box_size=cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
    )
