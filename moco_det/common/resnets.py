"""ResNets: their depths; the wider ones of the paper's Table 1, and small ones; which one it is."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.models import resnet

# Residual blocks in res2 to res5, by depth.
BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class WidenedResNet(resnet.ResNet):
    """A ResNet with `factor` times the channels in every layer, the stem included.

    The paper's R50w2x and R50w4x, "more channels, following" Kolesnikov et al. 2019, whose widening
    factor holds for all layers. (torchvision's wide_resnet50_2 widens the 3x3 convolutions alone.)
    A factor below 1 makes an encoder that is small enough for trials on a CPU.

    Args:
        factor: of the channels.
        block, layers, num_classes, options: as for torchvision's ResNet.
    """

    def __init__(
        self, factor: float, block: type, layers: list[int], num_classes: int = 1000, **options
    ):
        self.factor = factor
        super().__init__(block, layers, **options)
        stem = int(64 * factor)
        self.conv1 = nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(stem)
        self.fc = nn.Linear(self.inplanes, num_classes)

    def _make_layer(self, block, planes: int, *args, **kwargs) -> nn.Sequential:
        if planes == 64:  # the first stage reads the stem
            self.inplanes = int(self.inplanes * self.factor)
        return super()._make_layer(block, int(planes * self.factor), *args, **kwargs)


@dataclass(frozen=True)
class Architecture:
    """A ResNet as torchvision and Detectron2 both parametrise it.

    `width_per_group` is Detectron2's, of res2's 3x3 convolutions. `widening` is the factor of all
    other channels, the stem's and the stages': the MoCo paper's R50w2x is (50, 1, 128, 2), where
    torchvision's wide_resnet50_2 is (50, 1, 128, 1). Below 1 it narrows.
    """

    depth: int
    groups: int = 1
    width_per_group: int = 64
    widening: float = 1

    def __str__(self) -> str:
        name = f"ResNet-{self.depth}" + (f"w{self.widening:g}x" if self.widening != 1 else "")
        special = (self.groups, self.width_per_group) != (1, 64 * self.widening)
        extra = f" with {self.groups} groups of width {self.width_per_group}" if special else ""
        return name + extra

    @property
    def bottleneck(self) -> bool:
        return self.depth >= 50

    @property
    def stem_channels(self) -> int:
        return int(64 * self.widening)

    @property
    def res2_channels(self) -> int:
        return int((256 if self.bottleneck else 64) * self.widening)

    def build(self) -> resnet.ResNet:
        """The network of torchvision, with an `fc` layer and random weights."""
        block = resnet.Bottleneck if self.bottleneck else resnet.BasicBlock
        layers = list(BLOCKS[self.depth])
        width = int(self.width_per_group / self.widening)  # torchvision's: of 64 planes
        return WidenedResNet(
            self.widening, block, layers, groups=self.groups, width_per_group=width
        )

    def config(self) -> dict[str, object]:
        """Detectron2's config keys that weights of this network, trained as MoCo and torchvision
        train them, need: depth and width, RGB input, ImageNet's mean and deviation, and for
        bottlenecks the stride in the 3x3 convolution."""
        needs = {
            "INPUT.FORMAT": "RGB",
            "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
            "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
            "MODEL.RESNETS.DEPTH": self.depth,
            "MODEL.RESNETS.STEM_OUT_CHANNELS": self.stem_channels,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": self.res2_channels,
        }
        if self.bottleneck:
            needs["MODEL.RESNETS.NUM_GROUPS"] = self.groups
            needs["MODEL.RESNETS.WIDTH_PER_GROUP"] = self.width_per_group
            needs["MODEL.RESNETS.STRIDE_IN_1X1"] = False
        return needs


def infer_architecture(weights: Mapping[str, Tensor]) -> Architecture | None:
    """The ResNet that arrays under torchvision's names belong to; a whole stage may be absent.

    None where the numbers of blocks are not those of a known ResNet.
    """
    blocks = {
        match.groups() for match in map(re.compile(r"layer(\d)\.(\d+)\.").match, weights) if match
    }
    counts = Counter(stage for stage, _ in blocks)
    found = tuple(counts[stage] for stage in "1234")
    bottleneck = any(name.endswith(".conv3.weight") for name in weights)
    for depth, expected in BLOCKS.items():
        same = all(n in (0, m) for n, m in zip(found, expected, strict=True))
        if any(found) and same and bottleneck == (depth >= 50):
            if not bottleneck:
                return Architecture(depth)
            width, width_per_group = _conv_shape(weights, "layer1.0.conv2.weight", (64, 64))
            out_channels, _ = _conv_shape(weights, "layer1.0.conv3.weight", (256, 64))
            groups = max(width // width_per_group, 1)
            return Architecture(depth, groups, width_per_group, out_channels / 256 or 1)
    return None


def _conv_shape(weights: Mapping[str, Tensor], name: str, usual: tuple[int, int]):
    """Output channels and input channels of a group; `usual` where there is no such array."""
    conv = weights.get(name)
    return usual if conv is None or conv.dim() != 4 else tuple(conv.shape[:2])
