"""Features of an encoder: what the kNN classifier and the linear protocol work on.

Shape legend:
    N: images of a batch     M: images of a split     D: pooled features
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import Dataset

from moco_det.common.errors import UserError
from moco_det.common.processes import all_objects, gather, is_main, print_on_main, rank, world_size
from pretrain.data.augmentations import resize_and_center_crop
from pretrain.data.images import Loading, UnreadableImages, build_loader
from pretrain.data.labelled import LabelledImages, LabelledSplit, centre_crop, find_class_folders
from pretrain.data.listing import class_folders
from pretrain.engine import checkpoints
from pretrain.engine.checkpoints import Checkpoint
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
        body = {name: value for name, value in weights.items() if not name.startswith("fc.")}
        try:
            missing, unexpected = encoder.load_state_dict(body, strict=False)
        except RuntimeError as error:  # equal names, other shapes
            missing, unexpected = [str(error).splitlines()[-1].strip()], []
        wrong = sorted({*missing, *unexpected} - {"fc.weight", "fc.bias"})
        if wrong:
            raise UserError(
                f"{pretrained} does not fit: check -a {arch} and --small-stem; {wrong[0]}"
            )
    return encoder.eval().requires_grad_(False)


def read_weights(pretrained: str, arch: str) -> dict[str, torch.Tensor]:
    """Those of `load_encoder`, with their own head."""
    if pretrained != SUPERVISED:
        path = Path(pretrained)
        return query_encoder(Checkpoint(path, checkpoints.load(path)), arch)
    try:
        published = torchvision.models.get_model_weights(arch).IMAGENET1K_V1
        return published.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (ValueError, AttributeError) as error:
        raise UserError(f"torchvision has no supervised weights for -a {arch}") from error
    except OSError as error:
        folder = Path(torch.hub.get_dir(), "checkpoints")
        raise UserError(
            f"cannot download {published.url}: {error}; put the file into {folder}"
        ) from error


def query_encoder(checkpoint: Checkpoint, arch: str) -> dict[str, torch.Tensor]:
    """The weights of f_q, or of what Lightning's modules call the backbone; UserError where there
    are none."""
    checkpoints.check_arch(checkpoint, arch)
    held = checkpoints.weights(checkpoint.state)
    for prefix in ("encoder_q.", "backbone."):
        found = {n.removeprefix(prefix): v for n, v in held.items() if n.startswith(prefix)}
        if found and prefix == "backbone.":
            print_on_main(f"{checkpoint.path}: stripped 'backbone.' from {len(found)} names")
        if found:
            return found
    raise UserError(f"{checkpoint.path} has no encoder_q: it is not a checkpoint of pretraining")


def pooled(encoder: nn.Module) -> nn.Module:
    """The encoder up to its global average pooling: images -> (N, D)."""
    return nn.Sequential(*list(encoder.children())[:-1], nn.Flatten())


def encode(
    network: nn.Module, images: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """uint8 N x H x W x 3 -> outputs N x D, fp32; `dtype` is that of mixed precision, if any."""
    mean = torch.tensor(PIXEL_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=images.device).view(3, 1, 1)
    pixels = images.permute(0, 3, 1, 2).float()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return network((pixels - mean) / std).float()


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
    share = range(rank(), len(dataset), world_size())
    loader = build_loader(dataset, workers, device.type == "cuda", batch_size=128, sampler=share)
    features, labels = [], []
    for images, targets in loader:
        images = images.to(device, non_blocking=True)
        features.append(extract(backbone, images, dtype))
        labels.append(targets.to(device))
    total = len(dataset)
    missing = -(-total // world_size()) - sum(map(len, labels))  # shares differ by one at most
    features = gather(F.pad(torch.cat(features), (0, 0, 0, missing)))
    labels = gather(F.pad(torch.cat(labels), (0, missing)))
    # Process r had images r, r + W, r + 2W and so on; the gather put one share after the other.
    order = torch.arange(len(labels), device=device).view(world_size(), -1).T.flatten()[:total]
    return features[order], labels[order]


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


# -- weighted kNN classification, the monitor of Wu et al. 2018 (Sec. 3.4) -------------------------


def weighted_knn(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    classes: int,
    k: int = 200,
    temperature: float = 0.07,
) -> torch.Tensor:
    """Class scores Q x classes: each of the k nearest votes with exp(cosine / temperature).

    Scores are relative to the nearest one's vote: at a low temperature votes exceed fp32.

    Args:
        bank: M x D and queries: Q x D, L2-normalised; bank_labels: M, in [0, classes).
    """
    similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # Q x k
    votes = ((similarity - similarity[:, :1]) / temperature).exp()
    scores = similarity.new_zeros(len(queries), classes)
    return scores.scatter_add_(1, bank_labels[nearest], votes)


@dataclass
class KnnMonitor:
    """Classifies DATA/val by the labelled features of DATA/train; trains on nothing.

    Features are the globally pooled ones below the projection head, in evaluation mode. The classes
    are those of train. Collective. Raises UserError where val has others, or processes see
    different data.

    Args:
        k, temperature: of `weighted_knn`; the temperature is sigma in later code of its authors.
    """

    data: Path
    image_size: int
    workers: int
    device: torch.device
    k: int = 200
    temperature: float = 0.07

    def __post_init__(self):
        self.classes, *splits = find_class_folders(self.data)
        self.bank, self.queries = map(self._images, splits)

    @staticmethod
    def applies_to(data: Path) -> bool:
        """Whether DATA has class folders in both train/ and val/, on every process. Collective."""
        return all(all_objects(all(class_folders(data / split) for split in ("train", "val"))))

    @torch.inference_mode()
    def top1(self, encoder: nn.Module) -> float:
        """Top-1 accuracy in percent; the same value on every process.

        Raises UserError where there is no readable image in train or in val.
        """
        was_training = encoder.training
        backbone = pooled(encoder.eval())
        bank, bank_labels = self._features(backbone, self.bank)
        queries, labels = self._features(backbone, self.queries)
        encoder.train(was_training)
        if not len(bank_labels) or not len(labels):
            part = "val" if len(bank_labels) else "train"
            raise UserError(f"no image in {self.data / part} can be read")
        correct = 0
        for some, targets in zip(queries.split(256), labels.split(256), strict=True):
            scores = weighted_knn(
                bank, bank_labels, some, len(self.classes), self.k, self.temperature
            )
            correct += int((scores.argmax(1) == targets).sum())
        return 100.0 * correct / len(labels)

    def _images(self, split: LabelledSplit) -> LabelledImages:
        crop = partial(resize_and_center_crop, size=self.image_size)
        return LabelledImages(split, self.image_size, crop)

    def _features(
        self, backbone: nn.Module, images: LabelledImages
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised features (M, D) and labels (M,) of all readable images."""
        features, labels = extract_all(backbone, images, self.workers, self.device)
        readable = labels >= 0
        return F.normalize(features[readable], dim=1), labels[readable]
