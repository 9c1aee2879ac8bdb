"""Encoders that can be written down by hand, without BN and with it, and images for them."""

import torch
from torch import nn


class MeanColour(nn.Module):
    """Linear in the mean colour of an image: (N, 3, H, W) -> (N, dim)."""

    def __init__(self, dim: int = 4):
        super().__init__()
        self.fc = nn.Linear(3, dim)

    def forward(self, pixels):
        return self.fc(pixels.mean(dim=(2, 3)))


class NormalisedColour(nn.Module):
    """MeanColour behind a batch normalisation of the pixels."""

    def __init__(self, dim: int = 4):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, dim)

    def forward(self, pixels):
        return self.fc(self.bn(pixels).mean(dim=(2, 3)))


class Residual(nn.Module):
    """A block of a ResNet, with a ReLU in place as theirs: (N, 3, H, W) -> (N, dim)."""

    def __init__(self, dim: int = 4, width: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, dim)

    def forward(self, pixels):
        before = self.relu(self.bn1(self.conv1(pixels)))
        after = self.relu(self.bn2(self.conv2(before)) + before)
        return self.fc(after.mean(dim=(2, 3)))


def views(n: int, seed: int = 0, size: int = 8) -> torch.Tensor:
    """Square images of noise, uint8 N x H x W x 3."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator)


def features(fc: nn.Linear, images: torch.Tensor) -> list[torch.Tensor]:
    """What MeanColour makes of each image after ImageNet's normalisation, L2-normalised."""
    outputs = [fc.weight @ pixels(image).mean(dim=(0, 1)) + fc.bias for image in images]
    return [output / output.norm() for output in outputs]


def pixels(image: torch.Tensor) -> torch.Tensor:
    """H x W x 3 after ImageNet's normalisation."""
    mean = torch.tensor([123.675, 116.28, 103.53])
    std = torch.tensor([58.395, 57.12, 57.375])
    return (image.float() - mean) / std


def features_by_group(
    fc: nn.Linear, images: torch.Tensor, groups: list[list[int]]
) -> list[torch.Tensor]:
    """What NormalisedColour makes of each image where `groups` of them share their statistics."""
    found = [torch.empty(0)] * len(images)
    for group in groups:
        together = torch.stack([pixels(images[i]) for i in group])  # n x H x W x 3
        mean = together.mean(dim=(0, 1, 2))
        variance = ((together - mean) ** 2).mean(dim=(0, 1, 2))
        for i in group:
            colour = ((pixels(images[i]) - mean) / (variance + 1e-5).sqrt()).mean(dim=(0, 1))
            output = fc.weight @ colour + fc.bias
            found[i] = output / output.norm()
    return found
