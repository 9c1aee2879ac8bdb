"""Features of a frozen encoder: what the kNN classifier and the linear protocol work on."""

from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset

from moco_det.common.errors import UserError
from moco_det.common.processes import gather, rank, world_size
from pretrain.data.images import build_loader
from pretrain.engine import checkpoints
from pretrain.moco.encoders import build_encoder
from pretrain.moco.instance_discrimination import PIXEL_MEAN, PIXEL_STD

# In place of a checkpoint's path: the encoder as it is initialised, and torchvision's weights of
# supervised training on ImageNet, the first that it published: 76.1 % top-1 for a ResNet-50.
RANDOM = "random"
SUPERVISED = "supervised"


def load_encoder(pretrained: str, arch: str, dim: int, small_stem: bool = False) -> nn.Module:
    """The query encoder of a checkpoint, frozen, in evaluation mode, its head replaced.

    Args:
        pretrained: path of a checkpoint of pretraining, ours or the official code's, RANDOM or
            SUPERVISED, which torchvision downloads.
        dim: outputs of the new last layer `fc`.
    Raises:
        UserError: the file holds no query encoder, or one that does not fit.
    """
    encoder = build_encoder(arch, dim, small_stem=small_stem)
    if pretrained != RANDOM:
        weights = read_weights(pretrained, arch)
        try:
            missing, unexpected = encoder.load_state_dict(weights, strict=False)
        except RuntimeError as error:  # equal names, other shapes
            missing, unexpected = [str(error).splitlines()[-1].strip()], []
        wrong = sorted({*missing, *unexpected} - {"fc.weight", "fc.bias"})
        if wrong:
            raise UserError(
                f"{pretrained} does not fit: check -a {arch} and --small-stem; {wrong[0]}"
            )
    return encoder.eval().requires_grad_(False)


def read_weights(pretrained: str, arch: str) -> dict[str, torch.Tensor]:
    """Those of `load_encoder` below the head."""
    if pretrained != SUPERVISED:
        return query_encoder(checkpoints.load(Path(pretrained)), Path(pretrained), arch)
    try:
        published = torchvision.models.get_model_weights(arch).IMAGENET1K_V1
        weights = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (ValueError, AttributeError) as error:
        raise UserError(f"torchvision has no supervised weights for -a {arch}") from error
    except OSError as error:
        folder = Path(torch.hub.get_dir(), "checkpoints")
        raise UserError(
            f"cannot download {published.url}: {error}; put the file into {folder}"
        ) from error
    return {name: value for name, value in weights.items() if not name.startswith("fc.")}


def query_encoder(state: dict, path: Path, arch: str) -> dict[str, torch.Tensor]:
    """The weights below the head of f_q. Raises UserError where there are none."""
    if state.get("arch", arch) != arch:
        raise UserError(f"{path} holds a {state['arch']}, not a {arch}: pass -a {state['arch']}")
    names = {name.removeprefix("module."): name for name in state["state_dict"]}
    weights = {
        short.removeprefix("encoder_q."): state["state_dict"][name]
        for short, name in names.items()
        if short.startswith("encoder_q.") and not short.startswith("encoder_q.fc.")
    }
    if not weights:
        raise UserError(f"{path} has no encoder_q: it is not a checkpoint of pretraining")
    return weights


def pooled(encoder: nn.Module) -> nn.Module:
    """The encoder up to its global average pooling: images -> (N, D)."""
    return nn.Sequential(*list(encoder.children())[:-1], nn.Flatten())


@torch.no_grad()
def extract(
    backbone: nn.Module, images: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """uint8 N x H x W x 3 -> features N x D, fp32; `dtype` is that of mixed precision, if any."""
    return encode(backbone, images, dtype)


def encode(
    network: nn.Module, images: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """As `extract`, with gradients."""
    mean = torch.tensor(PIXEL_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=images.device).view(3, 1, 1)
    pixels = images.permute(0, 3, 1, 2).float()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return network((pixels - mean) / std).float()


def extract_all(
    backbone: nn.Module,
    loader: DataLoader,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features M x D and labels M of a whole `share_loader`, in its data set's order. Collective.

    Every process gets all of them. Labels are negative for unreadable images.
    """
    features, labels = [], []
    for images, targets in loader:
        images = images.to(device, non_blocking=True)
        features.append(extract(backbone, images, dtype))
        labels.append(targets.to(device))
    total = len(loader.dataset)
    missing = -(-total // world_size()) - sum(map(len, labels))  # shares differ by one at most
    features = gather(F.pad(torch.cat(features), (0, 0, 0, missing)))
    labels = gather(F.pad(torch.cat(labels), (0, missing)))
    # Process r had images r, r + W, r + 2W and so on; the gather put one share after the other.
    order = torch.arange(len(labels), device=device).view(world_size(), -1).T.flatten()[:total]
    return features[order], labels[order]


def share_loader(dataset: Dataset, workers: int, device: torch.device) -> DataLoader:
    """This process's share of `dataset`, each image once."""
    share = range(rank(), len(dataset), world_size())
    return build_loader(dataset, workers, device.type == "cuda", batch_size=128, sampler=share)
