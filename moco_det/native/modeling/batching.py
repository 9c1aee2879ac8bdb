"""Images and label maps of different sizes to one tensor each, as Detectron2's ImageList."""

from collections.abc import Sequence

import torch
from torch import Tensor


def batch_images(
    images: Sequence[Tensor], mean: Tensor, std: Tensor, multiple: int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Normalise on the device of `mean`, pad with zeros to one size (N, 3, H, W).

    Args:
        images: each (3, h, w), 0-255, on any device.
        mean, std: (3, 1, 1).
        multiple: of which H and W are to be.

    Also returns the (height, width) of each image before padding.
    """
    sizes = [(x.shape[-2], x.shape[-1]) for x in images]
    height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes, strict=True))
    padded = mean.new_zeros((len(images), 3, height, width))
    for target, image, (h, w) in zip(padded, images, sizes, strict=True):
        image = image.to(mean.device, non_blocking=True)
        target[:, :h, :w] = (image - mean) / std
    return padded, sizes


def batch_labels(
    label_maps: Sequence[Tensor], size: tuple[int, int], padding: int, device: torch.device
) -> Tensor:
    """Label maps, each (h, w) int64, padded with the label `padding` to (N, *size)."""
    padded = torch.full((len(label_maps), *size), padding, dtype=torch.int64, device=device)
    for target, labels in zip(padded, label_maps, strict=True):
        target[: labels.shape[0], : labels.shape[1]] = labels.to(device, non_blocking=True)
    return padded
