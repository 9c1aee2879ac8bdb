"""The encoders f_q and f_k: ResNets with the head of MoCo v1 or v2."""

import torchvision
from torch import nn
from torchvision.models import resnet

from pretrain.errors import UserError

TORCHVISION = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if name.startswith(("resnet", "resnext", "wide_resnet"))
]


class WidenedResNet(resnet.ResNet):
    """A ResNet with `factor` times the channels in every layer, the stem included.

    The paper's R50w2x and R50w4x, "more channels, following" Kolesnikov et al. 2019, whose widening
    factor holds for all layers. (torchvision's wide_resnet50_2 widens the 3x3 convolutions alone.)
    A factor below 1 makes an encoder that is small enough for trials on a CPU.
    """

    def __init__(self, block, layers: list[int], factor: float, num_classes: int = 1000):
        self.factor = factor
        super().__init__(block, layers)
        stem = int(64 * factor)
        self.conv1 = nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(stem)
        self.fc = nn.Linear(self.inplanes, num_classes)

    def _make_layer(self, block, planes: int, *args, **kwargs) -> nn.Sequential:
        if planes == 64:  # the first stage reads the stem
            self.inplanes = int(self.inplanes * self.factor)
        return super()._make_layer(block, int(planes * self.factor), *args, **kwargs)


# Encoders of Table 1 that torchvision does not know by name, and two small ones.
BUILDERS = {
    "resnext50_32x8d": lambda num_classes: resnet.ResNet(
        resnet.Bottleneck, [3, 4, 6, 3], num_classes, groups=32, width_per_group=8
    ),
    "resnet50w2x": lambda num_classes: WidenedResNet(
        resnet.Bottleneck, [3, 4, 6, 3], 2, num_classes
    ),
    "resnet50w4x": lambda num_classes: WidenedResNet(
        resnet.Bottleneck, [3, 4, 6, 3], 4, num_classes
    ),
    "resnet18w0.25x": lambda num_classes: WidenedResNet(
        resnet.BasicBlock, [2, 2, 2, 2], 0.25, num_classes
    ),
    "resnet50w0.25x": lambda num_classes: WidenedResNet(
        resnet.Bottleneck, [3, 4, 6, 3], 0.25, num_classes
    ),
}
ARCHITECTURES = sorted([*TORCHVISION, *BUILDERS])


def build_encoder(
    arch: str, dim: int = 128, mlp: bool = False, small_stem: bool = False
) -> nn.Module:
    """A ResNet whose last layer gives `dim` features.

    Args:
        arch: one of ARCHITECTURES, e.g. "resnet50".
        mlp: MoCo v2's two-layer head, hidden layer as wide as the pooled features, ReLU between.
        small_stem: for 32-pixel images: a 3x3 convolution of stride 1 and no max-pooling, as in
            CIFAR ResNets. Such weights do not fit detectors.
    """
    if arch not in ARCHITECTURES:
        raise UserError(f"unknown --arch {arch}; known: {', '.join(ARCHITECTURES)}")
    if arch in BUILDERS:
        encoder = BUILDERS[arch](num_classes=dim)
    else:
        encoder = torchvision.models.get_model(arch, weights=None, num_classes=dim)
    if mlp:
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    if small_stem:
        channels = encoder.conv1.out_channels
        encoder.conv1 = nn.Conv2d(3, channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder
