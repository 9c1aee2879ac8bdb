"""An encoder without BN that can be written down by hand, and images for it."""

import torch
from torch import nn


class MeanColour(nn.Module):
    """Linear in the mean colour of an image: (N, 3, H, W) -> (N, dim)."""

    def __init__(self, dim: int = 4):
        super().__init__()
        self.fc = nn.Linear(3, dim)

    def forward(self, pixels):
        return self.fc(pixels.mean(dim=(2, 3)))


def views(n: int, seed: int) -> torch.Tensor:
    """Images of noise, uint8 N x 8 x 8 x 3."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 8, 8, 3), dtype=torch.uint8, generator=generator)


def features(fc: nn.Linear, images: torch.Tensor) -> list[torch.Tensor]:
    """What MeanColour makes of each image after ImageNet's normalisation, L2-normalised."""
    mean = torch.tensor([123.675, 116.28, 103.53])
    std = torch.tensor([58.395, 57.12, 57.375])
    colours = [((image.float() - mean) / std).mean(dim=(0, 1)) for image in images]
    outputs = [fc.weight @ colour + fc.bias for colour in colours]
    return [output / output.norm() for output in outputs]
