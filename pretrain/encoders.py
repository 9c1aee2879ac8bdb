"""The encoders f_q and f_k: torchvision's ResNets with the head of MoCo v1 or v2."""

import torchvision
from torch import nn

from pretrain.errors import UserError

ARCHITECTURES = sorted(
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if name.startswith(("resnet", "resnext", "wide_resnet"))
)


def build_encoder(
    arch: str, dim: int = 128, mlp: bool = False, small_stem: bool = False
) -> nn.Module:
    """A ResNet whose last layer gives `dim` features.

    Args:
        arch: a torchvision ResNet, e.g. "resnet50".
        mlp: MoCo v2's two-layer head, hidden layer as wide as the pooled features, ReLU between.
        small_stem: for 32-pixel images: a 3x3 convolution of stride 1 and no max-pooling, as in
            CIFAR ResNets. Such weights do not fit detectors.
    """
    if arch not in ARCHITECTURES:
        raise UserError(f"unknown --arch {arch}; known: {', '.join(ARCHITECTURES)}")
    encoder = torchvision.models.get_model(arch, weights=None, num_classes=dim)
    if mlp:
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    if small_stem:
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder
