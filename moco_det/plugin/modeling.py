"""The C4 box head of the paper, in Detectron2's registry.

The dilated-C5 backbone (MoCo, arXiv:1911.05722, appendix A.1) for Detectron2.

MODEL: {BACKBONE: {NAME: build_resnet_dilated_c5_backbone}, RESNETS: {RES5_DILATION: 2}}

The FCN-16s head of the paper (MoCo, arXiv:1911.05722, appendix A.5), in Detectron2's registry.

MODEL: {META_ARCHITECTURE: SemanticSegmentor, SEM_SEG_HEAD: {NAME: FCN16Head, COMMON_STRIDE: 16}}
"""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    Backbone,
    build_resnet_backbone,
)
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from moco_det.config.checks import check_dilated_c5, semantic_feature


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


class DilatedC5(Backbone):
    """A ResNet whose res5 has stride 16, then a 3x3 convolution that makes it narrow.

    The one output is called "c5": "res5" is what goes into the reduction. As the paper names no
    activation after the reduction there is none, as in the FPN's convolutions. The ResNet is the
    child `bottom_up`, as an FPN's, so that weights of a ResNet load by the ends of their names.

    Args:
        bottom_up: a ResNet with dilation 2 in res5, and res5 among its outputs.
        norm: normalisation after the reduction, "" for none.
        out_channels: width of c5.
    """

    def __init__(self, bottom_up: Backbone, norm: str, out_channels: int = 512):
        super().__init__()
        self.bottom_up = bottom_up
        res5 = bottom_up.output_shape()["res5"]
        self.reduce = Conv2d(
            res5.channels,
            out_channels,
            kernel_size=3,
            padding=1,
            bias=not norm,
            norm=get_norm(norm, out_channels),
        )
        c2_msra_fill(self.reduce)
        self._out_features = ["c5"]
        self._out_feature_channels = {"c5": out_channels}
        self._out_feature_strides = {"c5": res5.stride}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) -> {"c5": (N, 512, H / 16, W / 16)}."""
        return {"c5": self.reduce(self.bottom_up(x)["res5"])}


@BACKBONE_REGISTRY.register()
def build_resnet_dilated_c5_backbone(cfg, input_shape: ShapeSpec) -> DilatedC5:
    """Called by Detectron2 where MODEL.BACKBONE.NAME is this function's name.

    Raises:
        UserError: the ResNet of the config has no dilated res5.
    """
    check_dilated_c5(cfg)
    return DilatedC5(build_resnet_backbone(cfg, input_shape), cfg.MODEL.RESNETS.NORM)


@SEM_SEG_HEADS_REGISTRY.register()
class FCN16Head(nn.Module):
    """Two 3x3 convolutions of dilation 6 with norm and ReLU, a 1x1 classifier, upsampling.

    Args:
        in_feature: name of the feature map to work on.
        input_shape: its width and stride; the paper's stride is 16.
        num_classes: K.
        channels: width of the 3x3 convolutions; 256 in the paper.
        norm: their normalisation, "" for none.
        ignore_value: label of the pixels that take no part in the loss.
        loss_weight: factor of the loss.
    """

    @configurable
    def __init__(
        self,
        in_feature: str,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        channels: int = 256,
        norm: str = "SyncBN",
        ignore_value: int = 255,
        loss_weight: float = 1.0,
    ):
        super().__init__()
        self.in_feature = in_feature
        self.stride = input_shape.stride
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.conv1 = _dilated_conv(input_shape.channels, channels, norm)
        self.conv2 = _dilated_conv(channels, channels, norm)
        self.predictor = Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        """UserError where the backbone has not the feature that the config names."""
        head = cfg.MODEL.SEM_SEG_HEAD
        strides = {name: shape.stride for name, shape in input_shape.items()}
        in_feature = semantic_feature(cfg, strides)
        return {
            "in_feature": in_feature,
            "input_shape": input_shape[in_feature],
            "num_classes": head.NUM_CLASSES,
            "channels": head.CONVS_DIM,
            "norm": head.NORM,
            "ignore_value": head.IGNORE_VALUE,
            "loss_weight": head.LOSS_WEIGHT,
        }

    def forward(self, features: dict[str, Tensor], targets: Tensor | None = None):
        """Detectron2's convention for heads.

        Args:
            features: the one of `in_feature` is (N, C, h, w).
            targets: label maps (N, H, W), needed in training.

        Returns:
            In training (None, {"loss_sem_seg"}). In inference (logits, {}), the logits
            (N, K, stride * h, stride * w), of which SemanticSegmentor cuts out the images.
        """
        x = self.predictor(self.conv2(self.conv1(features[self.in_feature])))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        # Feature i lies on pixel stride * i, so the corners are aligned; one replicated value more
        # reaches the pixels behind the last. See the native `upsample`.
        height, width = (side * self.stride + 1 for side in x.shape[-2:])
        x = F.pad(x, (0, 1, 0, 1), mode="replicate")
        x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)
        x = x[..., :-1, :-1]
        return (None, self.losses(x, targets)) if self.training else (x, {})

    def losses(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Mean cross entropy of the labelled pixels; 0, with a gradient of 0, where none is."""
        logits = logits[..., : targets.shape[-2], : targets.shape[-1]]
        total = F.cross_entropy(logits, targets, ignore_index=self.ignore_value, reduction="sum")
        labelled = (targets != self.ignore_value).sum().clamp(min=1)
        return {"loss_sem_seg": total / labelled * self.loss_weight}


def _dilated_conv(in_channels: int, channels: int, norm: str) -> Conv2d:
    conv = Conv2d(
        in_channels,
        channels,
        kernel_size=3,
        padding=6,
        dilation=6,
        bias=not norm,
        norm=get_norm(norm, channels),
        activation=F.relu_,
    )
    c2_msra_fill(conv)
    return conv
