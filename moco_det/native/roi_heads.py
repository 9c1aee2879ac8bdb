"""The second stage of Faster R-CNN: sample proposals, pool their features, classify and refine.

Shapes: N images, Ri regions in image i, R = sum(Ri), K classes (the label K is background),
Gi ground-truth boxes in image i.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from moco_det.native.boxes import Weights, decode, encode, match, pairwise_iou, subsample
from moco_det.native.layers import ConvNorm, get_norm
from moco_det.native.pooling import RegionPooler
from moco_det.native.resnet import BottleneckBlock, make_stage


class RegionSamples(NamedTuple):
    """Regions to train on."""

    boxes: list[Tensor]  # N tensors (Ri, 4)
    classes: Tensor  # (R,), K for background
    gt_boxes: Tensor  # (R, 4), meaningless for background


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
    def __call__(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_classes: list[Tensor]
    ) -> RegionSamples:
        samples = [
            self._sample_image(*image)
            for image in zip(proposals, gt_boxes, gt_classes, strict=True)
        ]
        boxes, classes, targets = zip(*samples, strict=True)
        return RegionSamples(list(boxes), torch.cat(classes), torch.cat(targets))

    def _sample_image(
        self, proposals: Tensor, gt_boxes: Tensor, gt_classes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        return boxes[chosen], classes[chosen], targets[chosen]


class FastRCNNOutputLayers(nn.Module):
    """Class scores and box deltas of each region, their losses, and the detections made of them.

    Args:
        in_features: length of a region's feature vector.
        num_classes: K.
        class_agnostic: one box per region rather than one for each class.
        box_weights: see `boxes.encode`.
        smooth_l1_beta: where the box loss turns from L2 to L1, in deltas; 0 is L1.
        box_loss_weight: factor of the box loss.
        score_thresh: detections with at most this probability are dropped.
        nms_thresh: IoU from which the lower-scored detection of one class is dropped.
        detections_per_image: at most so many, the best; -1 for all.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        class_agnostic: bool,
        box_weights: Weights,
        smooth_l1_beta: float,
        box_loss_weight: float,
        score_thresh: float,
        nms_thresh: float,
        detections_per_image: int,
    ):
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 * (1 if class_agnostic else num_classes))
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)
        self.num_classes = num_classes
        self.box_weights = box_weights
        self.smooth_l1_beta = smooth_l1_beta
        self.box_loss_weight = box_loss_weight
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_image = detections_per_image

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, ...) -> logits (R, K + 1) and deltas (R, K, 4), or (R, 1, 4) if class-agnostic."""
        x = x.flatten(1)
        return self.cls_score(x).float(), self.bbox_pred(x).float().unflatten(1, (-1, 4))

    def losses(self, logits: Tensor, deltas: Tensor, samples: RegionSamples) -> dict[str, Tensor]:
        """Mean cross-entropy over all regions, and the box loss of the foreground ones.

        The box loss is divided by R, not by the number of foreground regions, so that each of them
        counts the same whatever the batch (Detectron2). Without any region both losses are 0.
        """
        classes = samples.classes
        foreground = (classes < self.num_classes).nonzero().squeeze(1)
        columns = classes[foreground] if deltas.shape[1] > 1 else torch.zeros_like(foreground)
        boxes = torch.cat(samples.boxes)[foreground]
        targets = encode(boxes, samples.gt_boxes[foreground], self.box_weights)
        box_loss = F.smooth_l1_loss(
            deltas[foreground, columns], targets, beta=self.smooth_l1_beta, reduction="sum"
        )
        num_regions = max(len(classes), 1)
        return {
            "loss_cls": F.cross_entropy(logits, classes, reduction="sum") / num_regions,
            "loss_box_reg": box_loss / num_regions * self.box_loss_weight,
        }

    def detect(
        self,
        logits: Tensor,
        deltas: Tensor,
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """The detections of each image, best first: see `_detect_image`."""
        boxes = decode(deltas, torch.cat(proposals)[:, None], self.box_weights)
        counts = [len(p) for p in proposals]
        return [
            self._detect_image(*image)
            for image in zip(
                boxes.split(counts), logits.softmax(-1).split(counts), image_sizes, strict=True
            )
        ]

    def _detect_image(self, boxes: Tensor, probabilities: Tensor, size) -> dict[str, Tensor]:
        """(Ri, K or 1, 4), (Ri, K + 1) -> "boxes" (D, 4), "scores" (D,), "classes" (D,)."""
        finite = boxes.isfinite().flatten(1).all(1) & probabilities.isfinite().all(1)
        boxes = clip_boxes_to_image(boxes[finite], size)
        scores = probabilities[finite, :-1]
        region, classes = (scores > self.score_thresh).nonzero(as_tuple=True)
        scores = scores[region, classes]
        boxes = boxes[region, classes if boxes.shape[1] > 1 else 0]
        keep = batched_nms(boxes, scores, classes, self.nms_thresh)
        if self.detections_per_image >= 0:
            keep = keep[: self.detections_per_image]
        return {"boxes": boxes[keep], "scores": scores[keep], "classes": classes[keep]}


class FastRCNNConvFCHead(nn.Sequential):
    """3x3 convolutions, then fully connected layers, each followed by ReLU.

    Args:
        channels, resolution: of the pooled input.
        conv_dims, fc_dims: widths of the layers.
        norm: normalisation after every convolution, "" for none.

    Attribute `out_features` is the length of the flattened output.
    """

    def __init__(
        self, channels: int, resolution: int, conv_dims: list[int], fc_dims: list[int], norm: str
    ):
        super().__init__()
        for k, dim in enumerate(conv_dims, start=1):
            self.add_module(f"conv{k}", ConvNorm(channels, dim, 3, norm))
            self.add_module(f"conv_relu{k}", nn.ReLU())
            channels = dim
        self.add_module("flatten", nn.Flatten())
        self.out_features = channels * resolution**2
        for k, dim in enumerate(fc_dims, start=1):
            self.add_module(f"fc{k}", nn.Linear(self.out_features, dim))
            self.add_module(f"fc_relu{k}", nn.ReLU())
            self.out_features = dim
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                c2_msra_fill(layer)
            elif isinstance(layer, nn.Linear):
                c2_xavier_fill(layer)


class ROIHeads(nn.Module):
    """Sampling, pooling and prediction; subclasses say what lies between the last two.

    They also own the `box_predictor`: behind the network that feeds it, so that parameters come in
    Detectron2's order and optimizer states, which go by position, are its as well.

    Args:
        in_features: the feature maps it pools from, from high to low resolution.
    """

    box_predictor: FastRCNNOutputLayers

    def __init__(self, in_features: list[str], sampler: RegionSampler, pooler: RegionPooler):
        super().__init__()
        self.in_features = tuple(in_features)
        self.sampler = sampler
        self.pooler = pooler

    def region_features(self, maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """Maps (N, C, Hi, Wi) and N tensors (Ri, 4) -> (R, F), the input of the predictor."""
        raise NotImplementedError

    def forward(
        self,
        features: dict[str, Tensor],
        image_sizes: list[tuple[int, int]],
        proposals: list[Tensor],
        gt_boxes: list[Tensor] | None = None,
        gt_classes: list[Tensor] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """N tensors of proposals (Ri, 4) -> detections (inference) and losses (training).

        Ground truth, N tensors (Gi, 4) and (Gi,), in training only. Detections are in pixels of the
        network's input. What does not belong to the phase is empty.
        """
        maps = [features[name] for name in self.in_features]
        if self.training:
            samples = self.sampler(proposals, gt_boxes, gt_classes)
            predictions = self.predict(maps, samples.boxes)
            return [], self.box_predictor.losses(*predictions, samples)
        predictions = self.predict(maps, proposals)
        return self.box_predictor.detect(*predictions, proposals, image_sizes), {}

    def predict(self, maps: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.region_features(maps, boxes))


class Res5ROIHeads(ROIHeads):
    """The head of a C4 detector: stage res5 on every region, then the mean over positions.

    Pooling is linear in each channel and a 1x1 convolution linear at each position, so that the two
    can be exchanged: those of the first block run once on the map instead of on every region that
    covers a position. This saves a quarter of the head's arithmetic, and bins that the block's
    stride passes over need no pooling.
    """

    def __init__(self, res5: nn.Module, box_predictor: FastRCNNOutputLayers, **parts):
        super().__init__(**parts)
        self.res5 = res5
        self.box_predictor = box_predictor

    def region_features(self, maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
        def on_regions(conv: ConvNorm) -> Tensor:
            projected = [F.conv2d(feature, conv.weight) for feature in maps]
            return conv.norm(self.pooler(projected, boxes, every=conv.stride[0]))

        first = self.res5[0]
        out = first.after_conv1(on_regions(first.conv1)) + on_regions(first.shortcut)
        return self.res5[1:](F.relu_(out)).mean(dim=(2, 3))


class StandardROIHeads(ROIHeads):
    """The head of an FPN detector: a small network of its own on every region."""

    def __init__(self, box_head: nn.Module, box_predictor: FastRCNNOutputLayers, **parts):
        super().__init__(**parts)
        self.box_head = box_head
        self.box_predictor = box_predictor

    def region_features(self, maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
        return self.box_head(self.pooler(maps, boxes))


def build_res5(cfg, extra_norm: bool) -> nn.Sequential:
    """Stage res5 on pooled regions.

    `extra_norm` appends a norm, as `roi_heads.res5.norm`: MoCo's head (appendix A.1), where it
    calibrates the magnitudes that the new layers see (section 4.2).
    """
    resnets = cfg.MODEL.RESNETS
    out_channels = resnets.RES2_OUT_CHANNELS * 8
    res5 = make_stage(
        BottleneckBlock,
        3,
        out_channels // 2,
        out_channels,
        stride=2,
        norm=resnets.NORM,
        bottleneck_channels=resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 8,
        groups=resnets.NUM_GROUPS,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
    )
    if extra_norm:
        res5.add_module("norm", get_norm(resnets.NORM, out_channels))
    return res5


def build_box_head(cfg, channels: int) -> FastRCNNConvFCHead:
    head = cfg.MODEL.ROI_BOX_HEAD
    return FastRCNNConvFCHead(
        channels,
        head.POOLER_RESOLUTION,
        conv_dims=[head.CONV_DIM] * head.NUM_CONV,
        fc_dims=[head.FC_DIM] * head.NUM_FC,
        norm=head.NORM,
    )


def build_box_predictor(cfg, in_features: int) -> FastRCNNOutputLayers:
    head = cfg.MODEL.ROI_BOX_HEAD
    return FastRCNNOutputLayers(
        in_features,
        cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        class_agnostic=head.CLS_AGNOSTIC_BBOX_REG,
        box_weights=head.BBOX_REG_WEIGHTS,
        smooth_l1_beta=head.SMOOTH_L1_BETA,
        box_loss_weight=head.BBOX_REG_LOSS_WEIGHT,
        score_thresh=cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        nms_thresh=cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
        detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
    )


def build_roi_heads(cfg, backbone: nn.Module) -> ROIHeads:
    heads, box_head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    shared = {
        "in_features": heads.IN_FEATURES,
        "sampler": RegionSampler(
            num_classes=heads.NUM_CLASSES,
            iou_thresholds=heads.IOU_THRESHOLDS,
            iou_labels=heads.IOU_LABELS,
            batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
            positive_fraction=heads.POSITIVE_FRACTION,
            append_gt=heads.PROPOSAL_APPEND_GT,
        ),
        "pooler": RegionPooler(
            box_head.POOLER_RESOLUTION,
            [backbone.strides[name] for name in heads.IN_FEATURES],
            box_head.POOLER_SAMPLING_RATIO,
        ),
    }
    if heads.NAME == "StandardROIHeads":
        head = build_box_head(cfg, backbone.channels[heads.IN_FEATURES[0]])
        predictor = build_box_predictor(cfg, head.out_features)
        return StandardROIHeads(box_head=head, box_predictor=predictor, **shared)
    res5 = build_res5(cfg, extra_norm=heads.NAME == "Res5ROIHeadsExtraNorm")
    predictor = build_box_predictor(cfg, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8)
    return Res5ROIHeads(res5=res5, box_predictor=predictor, **shared)
