"""Features of an encoder: what the linear protocol works on, and the kNN classifier in `knn.py`.

Shape legend:
    N: images of a batch     M: images of a split     D: pooled features
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from moco_det.common.errors import UserError
from moco_det.common.processes import gather, is_main, print_on_main, rank, world_size
from moco_det.common.resnets import infer_architecture
from moco_det.common.weight_layouts import find_backbone, rename
from moco_det.common.weight_sources import (
    OFFICIAL,
    TORCHVISION,
    is_remote,
    read_state_dict,
    torchvision_url,
)
from pretrain.data.images import Loading, UnreadableImages, build_loader
from pretrain.data.labelled import LabelledImages, LabelledSplit, centre_crop
from pretrain.engine import checkpoints
from pretrain.engine.checkpoints import Checkpoint
from pretrain.moco.encoders import ARCHITECTURES, build_encoder, with_fc
from pretrain.moco.instance_discrimination import PIXEL_MEAN, PIXEL_STD

# In place of a source of weights: the encoder as it is initialised, and torchvision's weights of
# supervised training on ImageNet, the first that it published: 76.1 % top-1 for a ResNet-50.
RANDOM = "random"
SUPERVISED = "supervised"


def load_encoder(pretrained: str, arch: str, dim: int, small_stem: bool = False) -> nn.Module:
    """The encoder of a checkpoint of any known layout, frozen, in evaluation mode, its head new.

    Args:
        pretrained: as for `read_state_dict`, or RANDOM or SUPERVISED.
        dim: outputs of the new last layer `fc`.
    Raises:
        UserError: the file holds no encoder, or one that does not fit.
    """
    encoder = build_encoder(arch, dim, small_stem=small_stem)
    if pretrained != RANDOM:
        body = read_backbone(pretrained, arch)
        wanted = {n: v for n, v in encoder.state_dict().items() if not n.startswith("fc.")}
        for name, value in wanted.items():  # files older than PyTorch 0.4.1 count no batches
            if name.endswith("num_batches_tracked"):
                body.setdefault(name, value)
        wrong = checkpoints.misfit(wanted, body)
        if wrong:
            raise UserError(f"{pretrained} does not fit: check -a {arch} and --small-stem; {wrong}")
        encoder.load_state_dict(body, strict=False)
    return encoder.eval().requires_grad_(False)


def read_backbone(pretrained: str, arch: str) -> dict[str, torch.Tensor]:
    """The arrays of `load_encoder` under torchvision's names, without a head; said in a line."""
    source = _supervised(arch) if pretrained == SUPERVISED else pretrained
    if not is_remote(source) and not os.path.lexists(source):
        official = ", ".join(OFFICIAL)
        raise UserError(
            f"no checkpoint at {source}: name a file, {RANDOM}, {SUPERVISED}, {official}, or an "
            "address (https://, hf://, torchvision://)"
        )
    held, metadata = read_state_dict(source)
    if metadata.get("__author__") == "Caffe2":
        raise UserError(
            f"{source} is a Caffe2 file: torchvision has no network for it (BGR input, stride in "
            "the first 1x1 convolution)"
        )
    if metadata.get("arch") in ARCHITECTURES:
        checkpoints.check_arch(Checkpoint(Path(source), metadata), arch)
    checkpoints.tell_of_later_epoch(Path(source), metadata)
    try:
        found = find_backbone(held, metadata)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    vocabulary = found.layout.vocabulary
    arrays = rename(found.arrays(held), vocabulary, "torchvision")
    network = infer_architecture(arrays)
    print_on_main(f"{source}: {found.describe(network or arch, metadata)}")
    with torch.device("meta"):
        wanted = infer_architecture(build_encoder(arch).state_dict())
    if network is not None and network.depth != wanted.depth:
        raise UserError(f"{source} holds a {network}, not a {arch}: pass another -a")
    return arrays


def _supervised(arch: str) -> str:
    source = f"{TORCHVISION}{arch}"
    try:
        torchvision_url(source)
    except UserError as error:
        raise UserError(f"torchvision has no supervised weights for -a {arch}") from error
    return source


def pooled(encoder: nn.Module) -> nn.Module:
    """The encoder up to its head, whose weights it shares: images -> (N, D)."""
    return with_fc(encoder, nn.Flatten())  # for heads that do so themselves


def encode(
    network: nn.Module, images: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """uint8 N x H x W x 3 -> outputs N x D, fp32; `dtype` is that of mixed precision, if any."""
    mean, std = pixel_statistics(images.device, torch.get_default_dtype())
    pixels = images.permute(0, 3, 1, 2).float()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return network((pixels - mean) / std).float()


@cache
def pixel_statistics(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation, 3 x 1 x 1. Sent to a GPU once: it would be waited for in every step."""
    mean, std = torch.tensor([PIXEL_MEAN, PIXEL_STD], dtype=dtype, device=device).view(2, 3, 1, 1)
    return mean, std


extract = torch.no_grad()(encode)  # of a frozen backbone


def extract_all(
    backbone: nn.Module,
    dataset: Dataset,
    workers: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features M x D and labels M of all of `dataset`, in its order. Collective.

    Every process encodes a share of the images, and gets all features. Labels are negative for
    unreadable images.
    """
    batches = extract_share(backbone, dataset, workers, device, dtype)
    features, labels = zip(*batches, strict=True)
    total = len(dataset)
    missing = -(-total // world_size()) - sum(map(len, labels))  # shares differ by one at most
    features = gather(F.pad(torch.cat(features), (0, 0, 0, missing)))
    labels = gather(F.pad(torch.cat(labels), (0, missing)))
    # Process r had images r, r + W, r + 2W and so on; the gather put one share after the other.
    order = torch.arange(len(labels), device=device).view(world_size(), -1).T.flatten()[:total]
    return features[order], labels[order]


def extract_share(
    backbone: nn.Module,
    dataset: Dataset,
    workers: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Features N x D and labels N of this process's images, batch by batch: every W-th is its."""
    share = range(rank(), len(dataset), world_size())
    loader = build_loader(dataset, workers, device.type == "cuda", batch_size=128, sampler=share)
    for images, targets in loader:
        images = images.to(device, non_blocking=True)
        yield extract(backbone, images, dtype), targets.to(device)


@dataclass
class SplitFeatures:
    """Features of the centre crops of a split, under the weights that a backbone has when asked.

    Args:
        dtype: of mixed precision; None for float32.
    """

    split: LabelledSplit
    image_size: int
    loading: Loading
    device: torch.device
    dtype: torch.dtype | None

    def __post_init__(self):
        crop = partial(centre_crop, size=self.image_size)
        self.images = LabelledImages(self.split, self.image_size, crop)
        total, tolerated = len(self.images), self.loading.max_unreadable
        self.unreadable = UnreadableImages(total, tolerated, left_out=True)

    def compute(self, backbone: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Features M x D and labels M of the readable images, on every process. Collective.

        Raises:
            UserError: too many are unreadable.
        """
        print_on_main(f"features of {len(self.images)} images of {self.split.name}")
        workers = self.loading.workers
        features, labels = extract_all(backbone, self.images, workers, self.device, self.dtype)
        self.unreadable.add(self.images.unreadable(labels), warn=is_main())
        return features[labels >= 0], labels[labels >= 0]
