"""The dense pose branch of DensePose R-CNN (Güler et al. 2018): network, and surface on the image.

Shapes: N images, Ri regions in image i, R = sum(Ri), D detections, S the side of what is predicted
for a region, K channels of the coarse segmentation (2: person or not; 15: one of 14 parts or none),
C = 25 charts, the background's among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_det.common.errors import UserError
from moco_det.densepose.points import NUM_CHARTS


@dataclass(frozen=True)
class Charts:
    """What the network says of R regions, all in the frames of their boxes."""

    coarse: Tensor  # (R, K, S, S), logits
    fine: Tensor  # (R, C, S, S), logits of the charts
    u: Tensor  # (R, C, S, S), the coordinate on each chart
    v: Tensor

    def __getitem__(self, index: Tensor | slice) -> "Charts":
        return Charts(self.coarse[index], self.fine[index], self.u[index], self.v[index])

    def split(self, counts: Sequence[int]) -> list["Charts"]:
        """As `Tensor.split`."""
        fields = (t.split(counts) for t in (self.coarse, self.fine, self.u, self.v))
        return [Charts(*of_image) for of_image in zip(*fields, strict=True)]


class DensePoseV1ConvXHead(nn.Sequential):
    """Convolutions of one width with ReLU, under Detectron2's names.

    Args:
        channels: of the pooled input.
        num_convs: how many.
        dim: their width, the `out_channels`.
        kernel_size: odd.
    """

    def __init__(self, channels: int, num_convs: int, dim: int, kernel_size: int):
        super().__init__()
        for k in range(1, num_convs + 1):
            conv = nn.Conv2d(channels, dim, kernel_size, padding=kernel_size // 2)
            self.add_module(f"body_conv_fcn{k}", conv)
            self.add_module(f"body_conv_fcn_relu{k}", nn.ReLU())
            channels = dim
        self.out_channels = channels
        initialise(self)


class DensePoseChartPredictor(nn.Module):
    """Four transposed convolutions that double the side, then bilinear upsampling.

    Args:
        channels: of the input.
        num_coarse: K.
        kernel_size: of the transposed convolutions, even.
        up_scale: of the bilinear upsampling.
    """

    def __init__(self, channels: int, num_coarse: int, kernel_size: int, up_scale: int):
        super().__init__()
        self.up_scale = up_scale
        outputs = {"ann_index": num_coarse, "index_uv": 1, "u": 1, "v": 1}
        for name, width in outputs.items():
            width = width if name == "ann_index" else NUM_CHARTS + 1
            layer = nn.ConvTranspose2d(
                channels, width, kernel_size, stride=2, padding=kernel_size // 2 - 1
            )
            self.add_module(f"{name}_lowres", layer)
        initialise(self)

    def forward(self, x: Tensor) -> Charts:
        """(R, dim, H, W) -> all in float32 at least, S = 2 * H * up_scale."""
        layers = (self.ann_index_lowres, self.index_uv_lowres, self.u_lowres, self.v_lowres)
        return Charts(*(self._upsample(layer(x)) for layer in layers))

    def _upsample(self, x: Tensor) -> Tensor:
        x = F.interpolate(
            x, scale_factor=float(self.up_scale), mode="bilinear", align_corners=False
        )
        return x.to(torch.promote_types(x.dtype, torch.float32))


def initialise(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")


def surfaces(charts: Charts, boxes: Tensor) -> list[Tensor]:
    """Charts of D detections -> the surface at every pixel of their boxes (D, 4).

    As Detectron2's evaluator has it: the fields are resized to the box's width and height, rounded
    down to whole pixels (1 at least). A pixel is of the best chart, if the coarse segmentation is
    not of background; U and V are those on that chart.

    Returns:
        D tensors uint8 (3, height, width): chart (0 for background), U * 255, V * 255.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).long().clamp(min=1).tolist()
    return [
        _surface(charts[slice(i, i + 1)], (height, width))
        for i, (width, height) in enumerate(sides)
    ]


def _surface(charts: Charts, size: tuple[int, int]) -> Tensor:
    coarse, fine, u, v = (
        F.interpolate(x, size, mode="bilinear", align_corners=False)
        for x in (charts.coarse, charts.fine, charts.u, charts.v)
    )
    chart = fine.argmax(dim=1, keepdim=True) * (coarse.argmax(dim=1, keepdim=True) > 0)
    uv = torch.cat([u.gather(1, chart), v.gather(1, chart)], dim=1) * (chart > 0)
    return torch.cat([chart, (uv * 255).clamp(0, 255)], dim=1)[0].to(torch.uint8)


def build_densepose_head(cfg, channels: int) -> DensePoseV1ConvXHead:
    """UserError where the config asks for a head that there is not."""
    head = cfg.MODEL.ROI_DENSEPOSE_HEAD
    if head.NAME != "DensePoseV1ConvXHead":
        raise UserError(
            f"MODEL.ROI_DENSEPOSE_HEAD.NAME {head.NAME!r}: set it to 'DensePoseV1ConvXHead'"
        )
    if head.DECODER_ON:
        raise UserError(
            "MODEL.ROI_DENSEPOSE_HEAD.DECODER_ON True: the native engine has no decoder over the "
            "pyramid; set it to False, or use --engine detectron2"
        )
    side, predicted = head.HEATMAP_SIZE, 2 * head.POOLER_RESOLUTION * head.UP_SCALE
    if side != predicted:
        raise UserError(
            f"MODEL.ROI_DENSEPOSE_HEAD.HEATMAP_SIZE is {side}, but 2 * POOLER_RESOLUTION * "
            f"UP_SCALE is {predicted}: make them equal"
        )
    return DensePoseV1ConvXHead(
        channels, head.NUM_STACKED_CONVS, head.CONV_HEAD_DIM, head.CONV_HEAD_KERNEL
    )


def build_densepose_predictor(cfg, channels: int) -> DensePoseChartPredictor:
    head = cfg.MODEL.ROI_DENSEPOSE_HEAD
    return DensePoseChartPredictor(
        channels, head.NUM_COARSE_SEGM_CHANNELS, head.DECONV_KERNEL, head.UP_SCALE
    )
