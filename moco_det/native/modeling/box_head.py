"""The box branch of the second stage: network on each proposal, classes, refined boxes, NMS.

Shapes: N images, Ri proposals in image i, R = sum(Ri), K classes (the label K is background), D
detections in one image.
"""

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from moco_det.native.modeling.boxes import Losses, SampledProposals, Size, Weights, decode, encode
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
        classes = sampled.classes
        # Of a foreground proposal, the deltas of its own class.
        foreground = (classes < self.num_classes).nonzero().squeeze(1)
        columns = classes[foreground] if deltas.shape[1] > 1 else torch.zeros_like(foreground)
        boxes = torch.cat(sampled.boxes)[foreground]
        target_deltas = encode(boxes, sampled.gt_boxes[foreground], self.box_weights)
        box_loss = F.smooth_l1_loss(
            deltas[foreground, columns], target_deltas, beta=self.smooth_l1_beta, reduction="sum"
        )
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
        scores = probabilities[finite, :-1]  # without background
        # Every sufficiently likely class of a proposal is a detection of its own.
        proposal, classes = (scores > self.score_thresh).nonzero(as_tuple=True)
        scores = scores[proposal, classes]
        boxes = boxes[proposal, classes if boxes.shape[1] > 1 else 0]
        # NMS within each class; it returns the best first.
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
