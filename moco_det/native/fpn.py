"""Feature Pyramid Network (Lin et al. 2017)."""

import math

import torch.nn.functional as F
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from moco_det.native.layers import ConvNorm
from moco_det.native.resnet import build_resnet


class FPN(nn.Module):
    """Maps p2, p3, ... of one width, one for each bottom-up feature, and a last one by subsampling.

    Level i has stride 2^i: p2 comes from res2. The last level (p6 from p5) serves the RPN's
    largest anchors.

    Args:
        bottom_up: a backbone with attributes `channels` and `strides`.
        in_features: its features from high to low resolution, each of twice the stride before.
        out_channels: width of every map.
        norm: normalisation after every convolution, "" for none.
    """

    def __init__(self, bottom_up: nn.Module, in_features: list[str], out_channels: int, norm: str):
        super().__init__()
        self.in_features = tuple(in_features)
        self.levels = [int(math.log2(bottom_up.strides[name])) for name in in_features]
        if self.levels != list(range(self.levels[0], self.levels[0] + len(self.levels))):
            raise ValueError(f"FPN features {list(in_features)} do not double the stride each")
        for level, name in zip(self.levels, in_features, strict=True):
            lateral = ConvNorm(bottom_up.channels[name], out_channels, 1, norm)
            output = ConvNorm(out_channels, out_channels, 3, norm)
            c2_xavier_fill(lateral)
            c2_xavier_fill(output)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)
        # After the convolutions built on it: Detectron2's order of parameters.
        self.bottom_up = bottom_up
        pyramid = [*self.levels, self.levels[-1] + 1]
        self.channels = {f"p{level}": out_channels for level in pyramid}
        self.strides = {f"p{level}": 2**level for level in pyramid}
        # Without this, upsampled maps would not have the size of their lateral ones.
        self.size_divisibility = 2 ** self.levels[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W), H and W multiples of `size_divisibility` -> {"p2": ..., ...}."""
        features = self.bottom_up(x)
        pyramid, top_down = {}, None
        for level, name in zip(reversed(self.levels), reversed(self.in_features), strict=True):
            lateral = getattr(self, f"fpn_lateral{level}")(features[name])
            if top_down is not None:
                lateral = lateral + F.interpolate(top_down, scale_factor=2.0, mode="nearest")
            top_down = lateral
            pyramid[f"p{level}"] = getattr(self, f"fpn_output{level}")(lateral)
        last = self.levels[-1]
        pyramid[f"p{last + 1}"] = F.max_pool2d(pyramid[f"p{last}"], kernel_size=1, stride=2)
        return pyramid


def build_resnet_fpn(cfg) -> FPN:
    return FPN(
        build_resnet(cfg),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
    )
