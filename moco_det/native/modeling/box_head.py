"""The box branch of the second stage: network on each proposal, classes, refined boxes, NMS.

Shapes: N images, Ri proposals in image i, R = sum(Ri), K classes (the label K is background), D
detections in one image.
"""

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from moco_det.native.modeling.boxes import (
    Losses,
    SampledProposals,
    Size,
    Weights,
    batched_nms,
    best_of_each,
    decode,
    encode,
)
from moco_det.native.modeling.layers import ConvNorm


class FastRCNNOutputLayers(nn.Module):
    """Class scores and box deltas of each proposal, their losses, and the detections.

    Args:
        in_features: length of a proposal's feature vector.
        num_classes: K.
        class_agnostic: one box per proposal rather than one for each class.
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

    def losses(self, logits: Tensor, deltas: Tensor, sampled: SampledProposals) -> Losses:
        """Mean cross-entropy over all proposals, and the box loss of the foreground ones.

        The box loss is divided by R, not by the number of foreground proposals, so that each of
        them counts the same in every batch (Detectron2). Without any proposal both losses are 0.
        """
        classes, boxes = sampled.classes, torch.cat(sampled.boxes)
        # Of each proposal, the deltas of its own class; of background, both deltas and targets 0.
        background = classes == self.num_classes
        column = torch.zeros_like(classes)
        if deltas.shape[1] > 1:
            column = classes.masked_fill(background, 0)
        own = deltas[torch.arange(len(classes), device=classes.device), column]
        target_deltas = encode(boxes, sampled.gt_boxes, self.box_weights)
        own, target_deltas = (x.masked_fill(background[:, None], 0) for x in (own, target_deltas))
        box_loss = F.smooth_l1_loss(own, target_deltas, beta=self.smooth_l1_beta, reduction="sum")
        num_proposals = max(len(classes), 1)
        return {
            "loss_cls": F.cross_entropy(logits, classes, reduction="sum") / num_proposals,
            "loss_box_reg": box_loss / num_proposals * self.box_loss_weight,
        }

    def detect(
        self,
        logits: Tensor,
        deltas: Tensor,
        proposals: list[Tensor],
        image_sizes: list[Size],
    ) -> list[dict[str, Tensor]]:
        """Of each image "boxes" (D, 4), "scores" (D,) and "classes" (D,), best first."""
        counts = [len(p) for p in proposals]
        probabilities = logits.softmax(-1)
        boxes = decode(deltas, torch.cat(proposals)[:, None], self.box_weights)  # (R, K or 1, 4)
        finite = boxes.isfinite().flatten(1).all(1) & probabilities.isfinite().all(1)
        pairs = zip(boxes.split(counts), image_sizes, strict=True)
        boxes = torch.cat([clip_boxes_to_image(of_image, size) for of_image, size in pairs])

        # Every sufficiently likely class of a proposal is a candidate of its own, (C,) in all.
        scores = probabilities[:, :-1]  # without background
        likely = (scores > self.score_thresh) & finite[:, None]
        proposal, classes = likely.nonzero(as_tuple=True)
        counts = torch.stack([of_image.sum() for of_image in likely.split(counts)]).tolist()
        scores = scores[proposal, classes]
        boxes = boxes[proposal, classes if boxes.shape[1] > 1 else 0]

        # NMS within each class of each image; then, image by image, the best.
        kept = batched_nms(boxes, scores, classes, self.num_classes, counts, self.nms_thresh)
        candidates = [x.split(counts) for x in (boxes, scores, classes)]
        chosen = best_of_each(candidates[1], kept.split(counts), self.detections_per_image)
        return [
            dict(zip(("boxes", "scores", "classes"), (x[index] for x in of_image), strict=True))
            for index, *of_image in zip(chosen, *candidates, strict=True)
        ]


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
