"""The FCN-16s head of the paper (MoCo, arXiv:1911.05722, appendix A.5), in Detectron2's registry.

MODEL: {META_ARCHITECTURE: SemanticSegmentor, SEM_SEG_HEAD: {NAME: FCN16Head, COMMON_STRIDE: 16}}
"""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from moco_det.tasks import semantic_feature


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
        # reaches the pixels behind the last. See `moco_det.native.semantic_segmentor.upsample`.
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
