"""ResNets: their depths; the wider ones of the paper's Table 1, and small ones."""

from torch import nn
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
