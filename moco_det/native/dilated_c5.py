"""The dilated-C5 backbone (MoCo, arXiv:1911.05722, appendix A.1), with the plugin's names."""

from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from moco_det.config import check_dilated_c5
from moco_det.native.layers import ConvNorm
from moco_det.native.resnet import ResNet, build_resnet


class DilatedC5(nn.Module):
    """A ResNet whose res5 has stride 16, then a 3x3 convolution that makes it narrow.

    The one output is called "c5": "res5" is what goes into the reduction. As the paper names no
    activation after the reduction there is none, as in the FPN's convolutions.

    Args:
        bottom_up: a ResNet with `res5_dilation` 2 and the output res5 only.
        norm: normalisation after the reduction, "" for none.
        out_channels: width of c5.
    """

    size_divisibility = 1

    def __init__(self, bottom_up: ResNet, norm: str, out_channels: int = 512):
        super().__init__()
        self.bottom_up = bottom_up
        self.reduce = ConvNorm(bottom_up.channels["res5"], out_channels, 3, norm)
        c2_msra_fill(self.reduce)
        self.channels = {"c5": out_channels}
        self.strides = {"c5": bottom_up.strides["res5"]}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) -> {"c5": (N, 512, H / 16, W / 16)}."""
        return {"c5": self.reduce(self.bottom_up(x)["res5"])}


def build_resnet_dilated_c5(cfg) -> DilatedC5:
    check_dilated_c5(cfg)
    return DilatedC5(build_resnet(cfg), cfg.MODEL.RESNETS.NORM)
