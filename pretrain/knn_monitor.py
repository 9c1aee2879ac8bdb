"""Weighted kNN classification on frozen features, the monitor of Wu et al. 2018 (Sec. 3.4)."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from pretrain.collectives import gather, rank, world_size
from pretrain.errors import UserError
from pretrain.images import UnreadableImage, build_loader, find_images, read_image
from pretrain.instance_discrimination import PIXEL_MEAN, PIXEL_STD
from pretrain.views import resize_and_center_crop


def weighted_knn(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    classes: int,
    k: int = 200,
    temperature: float = 0.07,
) -> torch.Tensor:
    """Class scores Q x classes: each of the k nearest votes with exp(cosine / temperature).

    Args:
        bank: M x D and queries: Q x D, L2-normalised; bank_labels: M, in [0, classes).
    """
    similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # Q x k
    scores = similarity.new_zeros(len(queries), classes)
    return scores.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())


class KnnMonitor:
    """Classifies DATA/val by the labelled features of DATA/train; trains on nothing.

    Features are the globally pooled ones below the projection head, in evaluation mode.
    """

    def __init__(self, data: Path, image_size: int, workers: int, device: torch.device):
        self.device = device
        self.classes = class_folders(data / "val")
        self.bank = self._loader(data / "train", image_size, workers)
        self.queries = self._loader(data / "val", image_size, workers)

    @staticmethod
    def applies_to(data: Path) -> bool:
        """Whether DATA has class folders in both train/ and val/."""
        parts = (data / "train", data / "val")
        return all(part.is_dir() and class_folders(part) for part in parts)

    @torch.inference_mode()
    def top1(self, encoder: nn.Module) -> float:
        """Top-1 accuracy in percent; the same value on every process."""
        was_training = encoder.training
        features_of = pooled(encoder.eval())
        bank, bank_labels = self._features(features_of, self.bank)
        queries, labels = self._features(features_of, self.queries)
        encoder.train(was_training)
        correct = 0
        for some, truth in zip(queries.split(256), labels.split(256), strict=True):
            scores = weighted_knn(bank, bank_labels, some, len(self.classes))
            correct += int((scores.argmax(1) == truth).sum())
        return 100.0 * correct / len(labels)

    def _loader(self, folder: Path, image_size: int, workers: int):
        dataset = LabelledImages(folder, self.classes, image_size)
        share = range(rank(), len(dataset), world_size())
        return build_loader(
            dataset, workers, self.device.type == "cuda", batch_size=128, sampler=share
        )

    def _features(self, features_of: nn.Module, loader) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised features (M, D) and labels (M,) of all processes' shares."""
        mean = torch.tensor(PIXEL_MEAN, device=self.device).view(3, 1, 1)
        std = torch.tensor(PIXEL_STD, device=self.device).view(3, 1, 1)
        features, labels = [], []
        for images, targets in loader:
            pixels = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
            features.append(F.normalize(features_of((pixels - mean) / std), dim=1))
            labels.append(targets.to(self.device))
        share = -(-len(loader.dataset) // world_size())  # shares differ by one at most: pad
        features, labels = torch.cat(features), torch.cat(labels)
        missing = share - len(labels)
        features = gather(F.pad(features, (0, 0, 0, missing)))
        labels = gather(F.pad(labels, (0, missing), value=-1))
        return features[labels >= 0], labels[labels >= 0]


class LabelledImages(Dataset):
    """index -> evaluation view (S, S, 3) uint8 and class index, -1 for an unreadable image."""

    def __init__(self, folder: Path, classes: list[str], image_size: int):
        self.folder = folder
        self.image_size = image_size
        names = [path.decode(errors="surrogateescape") for path in find_images(folder)]
        labels = {name: i for i, name in enumerate(classes)}
        unknown = {n.split("/")[0] for n in names} - set(labels)
        if unknown:
            raise UserError(
                f"{folder} has class folder(s) that the val folder lacks: {sorted(unknown)[:5]}; "
                "make them agree or pass --knn-every 0"
            )
        self.paths = names
        self.labels = np.array([labels[name.split("/")[0]] for name in names])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        try:
            image = read_image(str(self.folder / self.paths[index]))
        except UnreadableImage:
            return np.zeros((self.image_size, self.image_size, 3), np.uint8), -1
        return resize_and_center_crop(image, self.image_size), self.labels[index]


def class_folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def pooled(encoder: nn.Module) -> nn.Module:
    """The encoder up to its global average pooling: images -> (N, D)."""
    return nn.Sequential(*list(encoder.children())[:-1], nn.Flatten())
