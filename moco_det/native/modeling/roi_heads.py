"""The second stage of the detectors: sample proposals, pool their features, run each head.

    ROIHeads
      Res5ROIHeads              C4: res5 on every proposal
      StandardROIHeads          FPN: a small network per head
        DensePoseROIHeads       and one for dense pose

Shapes: N images, feature maps (N, C, Hi, Wi), Ri proposals in image i, R = sum(Ri), F features of
a proposal, B bins a side, Di detections in image i, P keypoints, M the side of a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_det.common.errors import UserError
from moco_det.native.modeling.backbones import BottleneckBlock, feature_strides, make_stage
from moco_det.native.modeling.box_head import (
    FastRCNNOutputLayers,
    build_box_head,
    build_box_predictor,
)
from moco_det.native.modeling.boxes import (
    Losses,
    ProposalSampler,
    SampledProposals,
    Size,
    Targets,
    build_proposal_sampler,
)
from moco_det.native.modeling.densepose_head import (
    Charts,
    DensePoseChartLoss,
    DensePoseChartPredictor,
    DensePoseV1ConvXHead,
    build_densepose_head,
    build_densepose_loss,
    build_densepose_predictor,
    select_with_densepose,
)
from moco_det.native.modeling.keypoint_head import (
    KRCNNConvDeconvUpsampleHead,
    build_keypoint_head,
    select_with_visible_keypoints,
)
from moco_det.native.modeling.layers import ConvNorm, get_norm
from moco_det.native.modeling.mask_head import MaskRCNNConvUpsampleHead, build_mask_head
from moco_det.native.modeling.pooling import ROIPooler

Detections = list[dict[str, Tensor | Charts]]


class ROIHeads(nn.Module):
    """Sampling, pooling and prediction; subclasses say how the heads get their features.

    They also own the heads, in Detectron2's order of parameters, so that optimizer states, which go
    by position, are its as well. A head that is not asked for is None.

    Args:
        in_features: the feature maps it pools from, from high to low resolution.
        sampler: draws the proposals to train on.
        pooler: of the box head.
    """

    box_predictor: FastRCNNOutputLayers
    mask_head: MaskRCNNConvUpsampleHead | None
    keypoint_head: KRCNNConvDeconvUpsampleHead | None

    def __init__(self, in_features: list[str], sampler: ProposalSampler, pooler: ROIPooler):
        super().__init__()
        self.in_features = tuple(in_features)
        self.sampler = sampler
        self.pooler = pooler

    def forward(
        self,
        features: dict[str, Tensor],
        image_sizes: list[Size],
        proposals: list[Tensor],
        targets: Targets | None = None,
    ) -> tuple[Detections, Losses]:
        """N tensors of proposals (Ri, 4) -> detections (inference) and losses (training).

        `targets` in training only. Detections are in pixels of the network's input: "boxes"
        (Di, 4), "scores" and "classes" (Di,), "mask_probabilities" (Di, M, M) in the boxes,
        "keypoints" (Di, P, 3), "charts" of dense pose. What does not belong to the phase is empty.
        """
        maps = [features[name] for name in self.in_features]
        if self.training:
            return [], self.losses(maps, self.sampler(proposals, targets), targets)
        return self.detect(maps, proposals, image_sizes), {}

    def losses(self, maps: list[Tensor], sampled: SampledProposals, targets: Targets) -> Losses:
        """By Detectron2's names, and in its order."""
        raise NotImplementedError

    def foreground(self, sampled: SampledProposals) -> Tensor:
        """Which of the proposals are on objects, bool (R,)."""
        return sampled.classes < self.sampler.num_classes

    def box_features(self, maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """Maps (N, C, Hi, Wi) and N tensors (Ri, 4) -> (R, F), the input of the predictor."""
        raise NotImplementedError

    def mask_features(self, maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """Maps (N, C, Hi, Wi) and N tensors (Ri, 4) -> (R, C, B, B), the input of the mask head."""
        raise NotImplementedError

    def detect(self, maps: list[Tensor], proposals: list[Tensor], sizes: list[Size]) -> Detections:
        """Boxes first; then masks and keypoints, in the boxes found rather than the proposals."""
        predictions = self.box_predictor(self.box_features(maps, proposals))
        found = self.box_predictor.detect(*predictions, proposals, sizes)
        boxes = [x["boxes"] for x in found]
        if self.mask_head is not None:
            classes = torch.cat([x["classes"] for x in found])
            masks = self.mask_head.predict(self.mask_features(maps, boxes), classes)
            split_per_image(found, "mask_probabilities", masks)
        if self.keypoint_head is not None:
            features = self.keypoint_pooler(maps, boxes)
            split_per_image(
                found, "keypoints", self.keypoint_head.predict(features, torch.cat(boxes))
            )
        return found


def split_per_image(found: Detections, key: str, values: Tensor | Charts) -> None:
    """Give each image, under `key`, its own of the `values` of all detections."""
    counts = [len(x["boxes"]) for x in found]
    for detections, of_image in zip(found, values.split(counts), strict=True):
        detections[key] = of_image


class Res5ROIHeads(ROIHeads):
    """The head of a C4 detector: stage res5 on every proposal.

    Boxes come from the mean over positions, masks from the positions themselves. Pooling is linear
    in each channel and a 1x1 convolution linear at each position, so that the two can be exchanged:
    those of the first block run once on the map instead of on every proposal that covers a
    position. This saves a quarter of the head's arithmetic, and bins that the block's stride passes
    over need no pooling.
    """

    keypoint_head = None

    def __init__(
        self,
        res5: nn.Module,
        box_predictor: FastRCNNOutputLayers,
        mask_head: MaskRCNNConvUpsampleHead | None = None,
        **parts,
    ):
        super().__init__(**parts)
        self.res5 = res5
        self.box_predictor = box_predictor
        self.mask_head = mask_head

    def mask_features(self, maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
        def convolve_and_pool(conv: ConvNorm) -> Tensor:
            projected = [F.conv2d(feature, conv.weight) for feature in maps]
            return conv.norm(self.pooler(projected, boxes, bin_stride=conv.stride[0]))

        # The first block, its two 1x1 convolutions of the input before the pooling.
        first = self.res5[0]
        out = first.after_conv1(convolve_and_pool(first.conv1))
        out += convolve_and_pool(first.shortcut)
        return self.res5[1:](F.relu_(out))

    def box_features(self, maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
        return self.mask_features(maps, boxes).mean(dim=(2, 3))

    def losses(self, maps: list[Tensor], sampled: SampledProposals, targets: Targets) -> Losses:
        features = self.mask_features(maps, sampled.boxes)  # both heads', computed once
        predictions = self.box_predictor(features.mean(dim=(2, 3)))
        losses = self.box_predictor.losses(*predictions, sampled)
        if self.mask_head is not None:
            foreground = sampled.indices(self.foreground(sampled))
            features, sampled = features[torch.cat(foreground)], sampled.take(foreground)
            losses |= self.mask_head.losses(features, sampled, targets.masks)
        return losses


class StandardROIHeads(ROIHeads):
    """The heads of an FPN detector: small networks of their own on every proposal.

    Args:
        mask_pooler, keypoint_pooler: of the heads that there are.
    """

    def __init__(
        self,
        box_head: nn.Module,
        box_predictor: FastRCNNOutputLayers,
        mask_head: MaskRCNNConvUpsampleHead | None = None,
        mask_pooler: ROIPooler | None = None,
        keypoint_head: KRCNNConvDeconvUpsampleHead | None = None,
        keypoint_pooler: ROIPooler | None = None,
        **parts,
    ):
        super().__init__(**parts)
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_head = mask_head
        self.mask_pooler = mask_pooler
        self.keypoint_head = keypoint_head
        self.keypoint_pooler = keypoint_pooler

    def box_features(self, maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
        return self.box_head(self.pooler(maps, boxes))

    def mask_features(self, maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
        return self.mask_pooler(maps, boxes)

    def losses(self, maps: list[Tensor], sampled: SampledProposals, targets: Targets) -> Losses:
        predictions = self.box_predictor(self.box_features(maps, sampled.boxes))
        losses = self.box_predictor.losses(*predictions, sampled)
        if self.mask_head is None and self.keypoint_head is None:
            return losses
        foreground = sampled.where(self.foreground(sampled))
        if self.mask_head is not None:
            features = self.mask_features(maps, foreground.boxes)
            losses |= self.mask_head.losses(features, foreground, targets.masks)
        if self.keypoint_head is not None:
            visible = select_with_visible_keypoints(foreground, targets.keypoints)
            features = self.keypoint_pooler(maps, visible.boxes)
            losses |= self.keypoint_head.losses(features, visible, targets.keypoints)
        return losses


class DensePoseROIHeads(StandardROIHeads):
    """Also says where on the body's surface the pixels of a person are.

    Args:
        densepose_head, densepose_predictor, densepose_loss, densepose_pooler: that branch.
        densepose_iou: overlap with its object above which a proposal is trained on.
    """

    def __init__(
        self,
        densepose_head: DensePoseV1ConvXHead,
        densepose_predictor: DensePoseChartPredictor,
        densepose_loss: DensePoseChartLoss,
        densepose_pooler: ROIPooler,
        densepose_iou: float,
        **parts,
    ):
        super().__init__(**parts)
        self.densepose_pooler = densepose_pooler
        self.densepose_head = densepose_head
        self.densepose_predictor = densepose_predictor
        self.densepose_loss = densepose_loss
        self.densepose_iou = densepose_iou

    def charts(self, maps: list[Tensor], boxes: list[Tensor]) -> Charts:
        """Maps (N, C, Hi, Wi) and N tensors (Ri, 4) -> those of all R boxes."""
        return self.densepose_predictor(self.densepose_head(self.densepose_pooler(maps, boxes)))

    def losses(self, maps: list[Tensor], sampled: SampledProposals, targets: Targets) -> Losses:
        losses = super().losses(maps, sampled, targets)
        foreground = sampled.where(self.foreground(sampled))
        posed = select_with_densepose(foreground, targets.densepose, self.densepose_iou)
        charts = self.charts(maps, posed.boxes)
        return losses | self.densepose_loss(charts, posed, targets.densepose)

    def detect(self, maps: list[Tensor], proposals: list[Tensor], sizes: list[Size]) -> Detections:
        found = super().detect(maps, proposals, sizes)
        split_per_image(found, "charts", self.charts(maps, [x["boxes"] for x in found]))
        return found


def build_res5(cfg, extra_norm: bool) -> nn.Sequential:
    """Stage res5, for pooled features.

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


def build_pooler(cfg, backbone: nn.Module, head: str) -> ROIPooler:
    """That of the section `head` of MODEL, such as ROI_MASK_HEAD."""
    section = cfg.MODEL[head]
    names = cfg.MODEL.ROI_HEADS.IN_FEATURES
    strides = feature_strides(backbone, names, "MODEL.ROI_HEADS.IN_FEATURES")
    return ROIPooler(
        section.POOLER_RESOLUTION,
        strides,
        section.POOLER_SAMPLING_RATIO,
        aligned=section.POOLER_TYPE == "ROIAlignV2",
    )


def build_roi_heads(cfg, backbone: nn.Module) -> ROIHeads:
    """UserError where the config asks for what these heads do not have."""
    heads = cfg.MODEL.ROI_HEADS
    standard = heads.NAME in ("StandardROIHeads", "DensePoseROIHeads")
    if cfg.MODEL.DENSEPOSE_ON and heads.NAME != "DensePoseROIHeads":
        raise UserError(
            f"MODEL.DENSEPOSE_ON True: the heads MODEL.ROI_HEADS.NAME {heads.NAME!r} know no dense "
            "pose; use 'DensePoseROIHeads'"
        )
    build = build_standard_heads if standard else build_res5_heads
    sampler, pooler = build_proposal_sampler(cfg), build_pooler(cfg, backbone, "ROI_BOX_HEAD")
    return build(cfg, backbone, in_features=heads.IN_FEATURES, sampler=sampler, pooler=pooler)


def build_res5_heads(cfg, backbone: nn.Module, **shared) -> Res5ROIHeads:
    name, model = cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL
    if model.KEYPOINT_ON:
        raise UserError(
            f"MODEL.KEYPOINT_ON True: the heads MODEL.ROI_HEADS.NAME {name!r} find no keypoints; "
            "use 'StandardROIHeads'"
        )
    if len(model.ROI_HEADS.IN_FEATURES) != 1:
        raise UserError(
            f"MODEL.ROI_HEADS.IN_FEATURES is {model.ROI_HEADS.IN_FEATURES}: the heads {name!r} "
            "pool from one map; name one, or use 'StandardROIHeads'"
        )
    channels = model.RESNETS.RES2_OUT_CHANNELS * 8
    return Res5ROIHeads(
        res5=build_res5(cfg, extra_norm=name == "Res5ROIHeadsExtraNorm"),
        box_predictor=build_box_predictor(cfg, channels),
        mask_head=build_mask_head(cfg, channels) if model.MASK_ON else None,
        **shared,
    )


def build_standard_heads(cfg, backbone: nn.Module, **shared) -> StandardROIHeads:
    channels = backbone.channels[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]]
    box_head = build_box_head(cfg, channels)
    parts = {"box_predictor": build_box_predictor(cfg, box_head.out_features)}
    if cfg.MODEL.MASK_ON:
        parts["mask_head"] = build_mask_head(cfg, channels)
        parts["mask_pooler"] = build_pooler(cfg, backbone, "ROI_MASK_HEAD")
    if cfg.MODEL.KEYPOINT_ON:
        parts["keypoint_head"] = build_keypoint_head(cfg, channels)
        parts["keypoint_pooler"] = build_pooler(cfg, backbone, "ROI_KEYPOINT_HEAD")
    if not cfg.MODEL.DENSEPOSE_ON:
        return StandardROIHeads(box_head=box_head, **parts, **shared)
    head = build_densepose_head(cfg, channels)
    return DensePoseROIHeads(
        densepose_head=head,
        densepose_predictor=build_densepose_predictor(cfg, head.out_channels),
        densepose_loss=build_densepose_loss(cfg),
        densepose_pooler=build_pooler(cfg, backbone, "ROI_DENSEPOSE_HEAD"),
        densepose_iou=cfg.MODEL.ROI_DENSEPOSE_HEAD.FG_IOU_THRESHOLD,
        box_head=box_head,
        **parts,
        **shared,
    )
