"""Images -> feature maps by name: ResNet, FPN, and the paper's dilated-C5 backbone.

    ResNet     (He et al. 2016)  {"res2", ..., "res5"}, torchvision's layer1 to layer4
    FPN        (Lin et al. 2017) {"p2", ..., "p6"}, on the stages of a ResNet
    DilatedC5  (MoCo, arXiv:1911.05722, appendix A.1) {"c5"}, on a res5 of stride 16

Parameters are called as in Detectron2. Every backbone says of its maps, by name, how many channels
(`channels`) and input pixels per position (`strides`) they have, and of which number the sides of
its input have to be multiples (`size_divisibility`).

Shapes: N images of H x W pixels, C channels; level i of a pyramid has stride 2^i.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn

from moco_det.common.errors import UserError
from moco_det.common.resnets import BLOCKS
from moco_det.config.checks import check_dilated_c5
from moco_det.config.loading import check_supported
from moco_det.native.modeling.layers import ConvNorm, Norm, freeze

# -- ResNet ---------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """relu(branch(x) + shortcut(x)); the shortcut is a projection where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str):
        super().__init__()
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = ConvNorm(in_channels, out_channels, 1, norm, stride=stride)

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions: the block of ResNet-18 and 34."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str):
        super().__init__(in_channels, out_channels, stride, norm)
        self.conv1 = ConvNorm(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2 = ConvNorm(out_channels, out_channels, 3, norm)
        _initialise(self.conv1, self.conv2, self.shortcut)

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu_(self.conv1(x)))


class BottleneckBlock(ResidualBlock):
    """1x1, 3x3, 1x1 convolutions: the block of ResNet-50 and deeper.

    `stride_in_1x1` puts the stride into the first convolution (the original MSRA weights) instead
    of the second (torchvision, and so MoCo).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm: str,
        *,
        bottleneck_channels: int,
        groups: int = 1,
        stride_in_1x1: bool = False,
        dilation: int = 1,
    ):
        super().__init__(in_channels, out_channels, stride, norm)
        width = bottleneck_channels
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = ConvNorm(in_channels, width, 1, norm, stride=stride_1x1)
        self.conv2 = ConvNorm(
            width, width, 3, norm, stride=stride_3x3, dilation=dilation, groups=groups
        )
        self.conv3 = ConvNorm(width, out_channels, 1, norm)
        _initialise(self.conv1, self.conv2, self.conv3, self.shortcut)

    def branch(self, x: Tensor) -> Tensor:
        return self.after_conv1(self.conv1(x))

    def after_conv1(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu_(self.conv2(F.relu_(x))))


def _initialise(*convs: nn.Conv2d | None) -> None:
    for conv in convs:
        if conv is not None:
            c2_msra_fill(conv)


def make_stage(
    block: type, num_blocks: int, in_channels: int, out_channels: int, stride: int, **options
) -> nn.Sequential:
    """`num_blocks` blocks, the first of which has the stride and changes the width."""
    blocks = [block(in_channels, out_channels, stride, **options)]
    for _ in range(num_blocks - 1):
        blocks.append(block(out_channels, out_channels, 1, **options))
    return nn.Sequential(*blocks)


class Stem(nn.Module):
    """7x7 convolution and max pooling, total stride 4."""

    def __init__(self, out_channels: int, norm: str):
        super().__init__()
        self.conv1 = ConvNorm(3, out_channels, 7, norm, stride=2)
        c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class ResNet(nn.Module):
    """Stem and stages up to the last one that is asked for.

    Args:
        depth: 18, 34, 50, 101 or 152.
        out_features: the stages whose output is returned, of "res2" to "res5".
        norm: "FrozenBN", "BN", "SyncBN", "naiveSyncBN" or "GN", after every convolution.
        freeze_at: how many stages are not trained: 1 is the stem, 2 the stem and res2, ...
        stride_in_1x1, groups, width_per_group: see `BottleneckBlock`; depth 50 and deeper.
        res5_dilation: 2 gives res5 dilation 2 in all its blocks and stride 16 (R-FCN's "DC5").
            (torchvision's `replace_stride_with_dilation` leaves the first block undilated.)
        stem_channels, res2_channels: outputs of the stem and of res2; each next stage doubles.
    """

    size_divisibility = 1

    def __init__(
        self,
        depth: int,
        *,
        out_features: list[str],
        norm: str,
        freeze_at: int,
        stride_in_1x1: bool = False,
        res5_dilation: int = 1,
        groups: int = 1,
        width_per_group: int = 64,
        stem_channels: int = 64,
        res2_channels: int = 256,
    ):
        super().__init__()
        self.stem = Stem(stem_channels, norm)
        self.out_features = tuple(out_features)
        self.channels, self.strides = {}, {}
        self.stages = []
        block = BottleneckBlock if depth >= 50 else BasicBlock
        in_channels, stride = stem_channels, 4
        last = max(int(name.removeprefix("res")) for name in out_features)
        for index, num_blocks in enumerate(BLOCKS[depth][: last - 1]):
            name = f"res{index + 2}"
            # Dilation takes the place of the stride: the map stays as large.
            dilation = res5_dilation if name == "res5" else 1
            first_stride = 1 if name == "res2" or dilation > 1 else 2
            options = {"norm": norm}
            if block is BottleneckBlock:
                options["bottleneck_channels"] = groups * width_per_group * 2**index
                options |= {"groups": groups, "stride_in_1x1": stride_in_1x1, "dilation": dilation}
            out_channels = res2_channels * 2**index
            stage = make_stage(
                block, num_blocks, in_channels, out_channels, first_stride, **options
            )
            self.add_module(name, stage)
            self.stages.append(name)
            in_channels, stride = out_channels, stride * first_stride
            if name in self.out_features:
                self.channels[name], self.strides[name] = out_channels, stride
        for name in ("stem", *self.stages)[:freeze_at]:
            freeze(getattr(self, name))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) -> {"res4": (N, C, H / 16, W / 16), ...}."""
        outputs = {}
        x = self.stem(x)
        for name in self.stages:
            x = getattr(self, name)(x)
            if name in self.out_features:
                outputs[name] = x
        return outputs


def build_resnet(cfg) -> ResNet:
    resnets = cfg.MODEL.RESNETS
    if resnets.RES5_DILATION not in (1, 2):
        raise UserError(f"MODEL.RESNETS.RES5_DILATION is {resnets.RES5_DILATION}; set it to 1 or 2")
    if resnets.DEPTH < 50:
        needed = {"RES2_OUT_CHANNELS": 64, "RES5_DILATION": 1, "NUM_GROUPS": 1}
        for key, value in needed.items():
            if resnets[key] != value:
                raise UserError(
                    f"MODEL.RESNETS.{key} is {resnets[key]}; "
                    f"ResNet-{resnets.DEPTH} (MODEL.RESNETS.DEPTH) needs {value}"
                )
    stages = [f"res{number}" for number in range(2, 6)]
    if not set(resnets.OUT_FEATURES) <= set(stages):
        raise UserError(
            f"MODEL.RESNETS.OUT_FEATURES is {resnets.OUT_FEATURES}: it takes {', '.join(stages)}"
        )
    return ResNet(
        resnets.DEPTH,
        out_features=resnets.OUT_FEATURES,
        norm=resnets.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        res5_dilation=resnets.RES5_DILATION,
        groups=resnets.NUM_GROUPS,
        width_per_group=resnets.WIDTH_PER_GROUP,
        stem_channels=resnets.STEM_OUT_CHANNELS,
        res2_channels=resnets.RES2_OUT_CHANNELS,
    )


# -- feature pyramid ------------------------------------------------------------------------------


class FPN(nn.Module):
    """Maps p2, p3, ... of one width, one for each bottom-up feature, and a last one by subsampling.

    Level i has stride 2^i: p2 comes from res2. The last level (p6 from p5) serves the RPN's
    largest anchors.

    Args:
        bottom_up: a backbone.
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
        # From the coarsest map down to the finest, each with what comes from above added to it.
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
    """Raises UserError where the ResNet lacks a feature, or their strides do not double."""
    bottom_up, fpn = build_resnet(cfg), cfg.MODEL.FPN
    feature_strides(bottom_up, fpn.IN_FEATURES, "MODEL.FPN.IN_FEATURES")
    try:
        return FPN(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, fpn.NORM)
    except ValueError as error:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES: {error}; see MODEL.RESNETS.RES5_DILATION"
        ) from error


def feature_strides(backbone: nn.Module, names: Sequence[str], key: str) -> list[int]:
    """Input pixels per pixel of the backbone's maps `names`, the value of the config key `key`.

    Raises:
        UserError: the backbone has no map of such a name, or there is no name.
    """
    missing = [name for name in names if name not in backbone.strides]
    if missing or not names:
        raise UserError(
            f"{key} {list(names)}: the backbone gives {', '.join(backbone.strides)}; name some of "
            "these (MODEL.RESNETS.OUT_FEATURES says what a ResNet gives)"
        )
    return [backbone.strides[name] for name in names]


# -- dilated C5 -----------------------------------------------------------------------------------


class DilatedC5(nn.Module):
    """A ResNet whose res5 has stride 16, then a 3x3 convolution that makes it narrow.

    The one output is called "c5": "res5" is what goes into the reduction. As the paper names no
    activation after the reduction there is none, as in the FPN's convolutions. The ResNet is the
    child `bottom_up`, as an FPN's, so that weights of a ResNet load by the ends of their names.

    Args:
        bottom_up: images -> {"res5": feature map}, with dilation 2 in all of res5.
        in_channels, stride: of res5.
        norm: normalisation after the reduction, see `layers.get_norm`.
        out_channels: width of c5.
    """

    size_divisibility = 1

    def __init__(
        self,
        bottom_up: nn.Module,
        in_channels: int,
        stride: int,
        norm: Norm,
        out_channels: int = 512,
    ):
        super().__init__()
        self.bottom_up = bottom_up
        self.reduce = ConvNorm(in_channels, out_channels, 3, norm)
        c2_msra_fill(self.reduce)
        self.channels = {"c5": out_channels}
        self.strides = {"c5": stride}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) -> {"c5": (N, 512, H / 16, W / 16)}."""
        return {"c5": self.reduce(self.bottom_up(x)["res5"])}


def build_resnet_dilated_c5(cfg) -> DilatedC5:
    """UserError unless the config's ResNet ends in a dilated res5, and returns only that."""
    check_dilated_c5(cfg)
    resnet = build_resnet(cfg)
    channels, stride = resnet.channels["res5"], resnet.strides["res5"]
    return DilatedC5(resnet, channels, stride, cfg.MODEL.RESNETS.NORM)


# -- from a config --------------------------------------------------------------------------------

BACKBONES = {
    "build_resnet_backbone": build_resnet,
    "build_resnet_fpn_backbone": build_resnet_fpn,
    "build_resnet_dilated_c5_backbone": build_resnet_dilated_c5,
}


def build_backbone(cfg) -> nn.Module:
    """The backbone that MODEL.BACKBONE.NAME names, its first stages frozen.

    Raises:
        UserError: the config asks for what the native engine does not have.
    """
    check_supported(cfg)
    return BACKBONES[cfg.MODEL.BACKBONE.NAME](cfg)
