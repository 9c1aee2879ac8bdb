"""The paper's modules in Detectron2's registries: `native.modeling` with Detectron2's norms.

- ROI_HEADS: `Res5ROIHeadsExtraNorm`, the C4 head with a norm after res5;
- BACKBONE: `build_resnet_dilated_c5_backbone`, dilated res5 with a 3x3 reduction
  (MODEL: {BACKBONE: {NAME: build_resnet_dilated_c5_backbone}, RESNETS: {RES5_DILATION: 2}});
- SEM_SEG_HEADS: `FCN16Head`, for label maps on a dilated res5
  (MODEL: {META_ARCHITECTURE: SemanticSegmentor, SEM_SEG_HEAD: {NAME: FCN16Head,
  COMMON_STRIDE: 16}}).
"""

from functools import partial

from detectron2.config import configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    Backbone,
    build_resnet_backbone,
)
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from torch import Tensor

from moco_det.config.checks import check_dilated_c5
from moco_det.native.modeling import backbones, semantic_head
from moco_det.native.modeling.layers import Norm


def detectron2_norm(name: str) -> Norm:
    """Detectron2's normalisation of this name, "" for none, as native layers take it."""
    return partial(get_norm, name) if name else ""


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """res5 as box head, followed by a norm, as `roi_heads.res5.norm`.

    MoCo v1, Sec. 4.2 and appendix: with BN trained, the head's output must be normalised as well.
    The name and the parameter's name are those of facebookresearch/moco's detection code.
    """

    @classmethod
    def _build_res5_block(cls, cfg):
        res5, channels = super()._build_res5_block(cfg)
        res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return res5, channels


class DilatedC5(backbones.DilatedC5, Backbone):
    """The native backbone as one of Detectron2's, around Detectron2's own ResNet."""

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self.channels[name], stride=self.strides[name])
            for name in self.channels
        }


@BACKBONE_REGISTRY.register()
def build_resnet_dilated_c5_backbone(cfg, input_shape: ShapeSpec) -> DilatedC5:
    """Called by Detectron2 where MODEL.BACKBONE.NAME is this function's name.

    Raises:
        UserError: the ResNet of the config has no dilated res5.
    """
    check_dilated_c5(cfg)
    resnet = build_resnet_backbone(cfg, input_shape)
    res5 = resnet.output_shape()["res5"]
    norm = detectron2_norm(cfg.MODEL.RESNETS.NORM)
    return DilatedC5(resnet, res5.channels, res5.stride, norm)


@SEM_SEG_HEADS_REGISTRY.register()
class FCN16Head(semantic_head.FCN16Head):
    """The native head by Detectron2's convention for heads."""

    @configurable
    def __init__(self, **arguments):
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        """UserError where the backbone has not the feature that the config names."""
        channels = {name: shape.channels for name, shape in input_shape.items()}
        strides = {name: shape.stride for name, shape in input_shape.items()}
        arguments = semantic_head.semantic_head_arguments(cfg, channels, strides)
        return arguments | {"norm": detectron2_norm(arguments["norm"])}

    def forward(self, features: dict[str, Tensor], targets: Tensor | None = None):
        """
        Args:
            features: the one of `in_feature` is (N, C, h, w).
            targets: label maps (N, H, W), needed in training.

        Returns:
            In training (None, {"loss_sem_seg"}). In inference (logits, {}), the logits
            (N, K, stride * h, stride * w), of which SemanticSegmentor cuts out the images.
        """
        logits = super().forward(features)
        return (None, self.losses(logits, targets)) if self.training else (logits, {})
