"""The encoders f_q and f_k: ResNets with the head of MoCo v1 or v2."""

from functools import partial

import torchvision
from torch import nn
from torchvision.models import resnet

from moco_det.common.errors import UserError
from moco_det.common.resnets import WidenedResNet

TORCHVISION = torchvision.models.list_models(
    module=torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"]
)

# Encoders of Table 1 that torchvision does not know by name, and two small ones.
R50, R18 = (resnet.Bottleneck, [3, 4, 6, 3]), (resnet.BasicBlock, [2, 2, 2, 2])
BUILDERS = {
    "resnext50_32x8d": partial(resnet.ResNet, *R50, groups=32, width_per_group=8),
    "resnet50w2x": partial(WidenedResNet, 2, *R50),
    "resnet50w4x": partial(WidenedResNet, 4, *R50),
    "resnet18w0.25x": partial(WidenedResNet, 0.25, *R18),
    "resnet50w0.25x": partial(WidenedResNet, 0.25, *R50),
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
