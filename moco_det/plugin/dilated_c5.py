"""The dilated-C5 backbone (MoCo, arXiv:1911.05722, appendix A.1) for Detectron2.

MODEL: {BACKBONE: {NAME: build_resnet_dilated_c5_backbone}, RESNETS: {RES5_DILATION: 2}}
"""

from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor

from moco_det.config import check_dilated_c5


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
