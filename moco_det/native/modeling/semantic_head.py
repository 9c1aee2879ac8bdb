"""FCN-16s for semantic segmentation (MoCo, arXiv:1911.05722, appendix A.5), and for depth: heads.

    ResNet with dilated res5 -> (N, C, H / 16, W / 16) -> FCN16Head -> logits (N, K, H, W)
                                                       -> FCNDepthHead -> metres (N, 1, H, W)

Shapes: N images of H x W pixels, K classes; a feature map is (N, C, h, w); a label map is (H, W)
int64, with `ignore_value` where a pixel has no class; a depth map (H, W) float32 in metres, with 0
where a pixel has no depth.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from moco_det.common.errors import UserError
from moco_det.config.checks import semantic_feature
from moco_det.native.modeling.boxes import Losses
from moco_det.native.modeling.layers import ConvNorm, Norm


class FCN16Head(nn.Module):
    """Two dilated 3x3 convolutions with norm and ReLU, a 1x1 classifier, upsampling.

    Args:
        in_feature: name of the feature map to work on.
        in_channels: its width.
        stride: of that map; 16 in the paper.
        num_classes: K.
        channels: width of the 3x3 convolutions; 256 in the paper.
        norm: their normalisation, see `layers.get_norm`.
        ignore_value: label of the pixels that take no part in the loss.
        loss_weight: factor of the loss.
        dilation: of the 3x3 convolutions; 6 in the paper.
    """

    def __init__(
        self,
        in_feature: str,
        in_channels: int,
        stride: int,
        num_classes: int,
        channels: int = 256,
        norm: Norm = "SyncBN",
        ignore_value: int = 255,
        loss_weight: float = 1.0,
        dilation: int = 6,
    ):
        super().__init__()
        self.in_feature = in_feature
        self.stride = stride
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.conv1 = ConvNorm(in_channels, channels, 3, norm, dilation=dilation)
        self.conv2 = ConvNorm(channels, channels, 3, norm, dilation=dilation)
        self.predictor = nn.Conv2d(channels, num_classes, 1)
        c2_msra_fill(self.conv1)
        c2_msra_fill(self.conv2)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Feature maps -> logits (N, K, stride * h, stride * w) for the map's (h, w).

        In float32 or finer. That is at least the size of the images, and lies on their pixels.
        """
        x = F.relu_(self.conv1(features[self.in_feature]))
        x = self.predictor(F.relu_(self.conv2(x)))
        # Half precision ends here: it is too coarse to interpolate and to sum over pixels in.
        return upsample(x.to(torch.promote_types(x.dtype, torch.float32)), self.stride)

    def losses(self, logits: Tensor, labels: Tensor) -> Losses:
        """Logits (N, K, H, W) or larger, and label maps (N, H, W) -> {"loss_sem_seg": mean}."""
        logits = logits[..., : labels.shape[-2], : labels.shape[-1]]
        loss = pixel_cross_entropy(logits, labels, self.ignore_value)
        return {"loss_sem_seg": loss * self.loss_weight}


class FCNDepthHead(FCN16Head):
    """The same layers with one output: how far away each pixel is, in metres."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ignore_value = 0  # of depths, not of labels

    def losses(self, depths: Tensor, measured: Tensor) -> Losses:
        """Depths (N, 1, H, W) or larger, and depth maps (N, H, W) -> {"loss_depth": mean}."""
        depths = depths[:, 0, : measured.shape[-2], : measured.shape[-1]]
        return {"loss_depth": depth_distance(depths, measured) * self.loss_weight}


def upsample(x: Tensor, stride: int) -> Tensor:
    """Bilinear upsampling (N, K, h, w) -> (N, K, stride * h, stride * w).

    Every layer of a ResNet that has a stride is centred on its first pixel (an odd kernel, padded
    by half of it), so that value i of the map lies on pixel stride * i in images of any size.
    The literature's crops, 513 = 32 * 16 + 1 and 769 = 48 * 16 + 1, are those whose last pixel has
    a value of its own. Interpolating between corners puts value i there and nowhere else. Beyond
    the last value, its copy stands for the pixels up to where the next would be.
    """
    height, width = (side * stride + 1 for side in x.shape[-2:])
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)
    return x[..., :-1, :-1]


def pixel_cross_entropy(logits: Tensor, labels: Tensor, ignore_value: int) -> Tensor:
    """Mean over the pixels with a label; 0, with a gradient of 0, where there are none.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W).
    """
    total = F.cross_entropy(logits, labels, ignore_index=ignore_value, reduction="sum")
    return total / (labels != ignore_value).sum().clamp(min=1)


def depth_distance(depths: Tensor, measured: Tensor) -> Tensor:
    """Mean |depth - measured| over the pixels (N, H, W) that have a depth, those above 0.

    0, with a gradient of 0, where there are none.
    """
    known = measured > 0
    # Not a product with the mask: what is not finite there must not count either.
    distance = torch.where(known, depths - measured, 0).abs().sum()
    return distance / known.sum().clamp(min=1)


def semantic_head_arguments(
    cfg, channels: Mapping[str, int], strides: Mapping[str, int]
) -> dict[str, Any]:
    """The constructor's arguments that MODEL.SEM_SEG_HEAD asks for, in a config of either engine.

    Args:
        channels, strides: of the backbone's feature maps, by name.

    Raises:
        UserError: the backbone has not the feature map that the config names.
    """
    head = cfg.MODEL.SEM_SEG_HEAD
    in_feature = semantic_feature(cfg, strides)
    # Detectron2's config has no such key where this project's were not added to it.
    dilation = {"dilation": head.DILATION} if "DILATION" in head else {}
    return {
        "in_feature": in_feature,
        "in_channels": channels[in_feature],
        "stride": strides[in_feature],
        "num_classes": head.NUM_CLASSES,
        "channels": head.CONVS_DIM,
        "norm": head.NORM,
        "ignore_value": head.IGNORE_VALUE,
        "loss_weight": head.LOSS_WEIGHT,
        **dilation,
    }


HEADS = {head.__name__: head for head in (FCN16Head, FCNDepthHead)}


def build_semantic_head(cfg, backbone: nn.Module) -> FCN16Head:
    """
    Args:
        backbone: with the attributes `channels` and `strides` by feature name.

    Raises:
        UserError: the config asks for another head, or the backbone has not what the head needs.
    """
    name = cfg.MODEL.SEM_SEG_HEAD.NAME
    if name not in HEADS:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.NAME is {name}: the native engine has FCN16Head only, and for "
            "depth FCNDepthHead"
        )
    return HEADS[name](**semantic_head_arguments(cfg, backbone.channels, backbone.strides))
