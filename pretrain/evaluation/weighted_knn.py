"""Weighted kNN classification on frozen features, the monitor of Wu et al. 2018 (Sec. 3.4)."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from moco_det.common.errors import UserError
from moco_det.common.processes import all_objects
from pretrain.data.augmentations import resize_and_center_crop
from pretrain.data.labelled import LabelledImages, LabelledSplit, find_class_folders
from pretrain.data.listing import class_folders
from pretrain.evaluation.features import extract_all, pooled


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
