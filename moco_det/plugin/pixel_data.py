"""Inputs of models that predict pixels, of label maps and of depth maps, with Detectron2's loaders.

The mappers have the names of the native engine's, and make the same of a record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    build_detection_test_loader,
    detection_utils,
)
from detectron2.data import transforms as T
from PIL import Image
from torch.utils.data import DataLoader

from moco_det.config.checks import is_depth
from moco_det.datasets import read_depth, read_labels
from moco_det.native.modeling.pixel_input import pad
from moco_det.plugin.frames import RandomFrame, RandomScale, ScaleChoice


@dataclass
class SemanticDatasetMapper:
    """Turns a record with a label map into a training input of Detectron2's SemanticSegmentor.

    The native engine's mapper of this name, with Detectron2's augmentations.

    Args:
        augmentations: Detectron2's, or like them.
        image_format: channel order the model wants.
        num_classes: what the labels must stay below.
        size: (height, width) to which smaller results are padded; None: as they are.
        padding: (3,) pixel with which they are: the mean, which is 0 after normalisation.
        ignore_value: label of such pixels.
    """

    augmentations: Sequence[T.Augmentation]
    image_format: str
    num_classes: int
    size: Sequence[int] | None
    padding: Sequence[float]
    ignore_value: int = 255

    def __post_init__(self):
        self.padding = torch.tensor(self.padding, dtype=torch.float32).view(3, 1, 1)

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with "image" (3, H, W) and "sem_seg" (H, W) int64.

        The image is uint8, or float32 where it is padded, with a mean that is no whole number.

        Raises:
            UserError: the label map cannot be read, is of another size, or a label is no class.
        """
        image = detection_utils.read_image(record["file_name"], format=self.image_format)
        detection_utils.check_image_size(dict(record), image)
        data = T.AugInput(image, sem_seg=read_labels(record, self.num_classes))
        T.AugmentationList(self.augmentations)(data)
        pixels = torch.from_numpy(np.ascontiguousarray(data.image.transpose(2, 0, 1)))
        labels = torch.from_numpy(data.sem_seg.astype(np.int64))
        if self.size is not None:
            pixels = pad(pixels, self.size, self.padding)
            labels = pad(labels, self.size, self.ignore_value)
        return {**record, "image": pixels, "sem_seg": labels}


@dataclass
class DepthDatasetMapper:
    """Turns a record with a depth map into a training input of a `DepthEstimator`.

    The native engine's mapper of this name, with Detectron2's augmentations.

    Args:
        augmentations: a `RandomFrame`, and perhaps Detectron2's flip.
        image_format: channel order the model wants.
    """

    augmentations: Sequence[T.Augmentation]
    image_format: str

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with "image" uint8 (3, H, W) and "depth" (H, W) float32 in metres.

        Raises:
            UserError: a file cannot be read, sizes differ, or a depth is none.
        """
        image = detection_utils.read_image(record["file_name"], format=self.image_format)
        detection_utils.check_image_size(dict(record), image)
        data = T.AugInput(image, sem_seg=read_depth(record))
        T.AugmentationList(self.augmentations)(data)
        pixels = np.ascontiguousarray(data.image.transpose(2, 0, 1))
        depths = np.ascontiguousarray(data.sem_seg)
        return {**record, "image": torch.from_numpy(pixels), "depth": torch.from_numpy(depths)}


def build_pixel_mapper(cfg) -> SemanticDatasetMapper | DepthDatasetMapper:
    """For training a model of pixels."""
    if is_depth(cfg):
        return DepthDatasetMapper(_build_scaling(cfg), cfg.INPUT.FORMAT)
    return build_semantic_mapper(cfg)


def _build_scaling(cfg) -> list[T.Augmentation]:
    """The resize and flip of the training images."""
    augmentations = detection_utils.build_augmentation(cfg, is_train=True)
    scale, choices, crop = cfg.INPUT.RANDOM_SCALE, cfg.INPUT.SCALE_CHOICES, cfg.INPUT.CROP
    if cfg.INPUT.FIXED_SIZE:
        fill = [round(value) for value in cfg.MODEL.PIXEL_MEAN]
        drawn = scale, choices, cfg.INPUT.RANDOM_ROTATION
        augmentations[0] = RandomFrame(cfg.INPUT.FIXED_SIZE, fill, *drawn)
    elif choices:
        augmentations[0] = ScaleChoice(choices, crop.SIZE if crop.ENABLED else ())
    elif scale:
        augmentations[0] = RandomScale(*scale)
    return augmentations


def build_semantic_mapper(cfg) -> SemanticDatasetMapper:
    """For training; `moco_det.config.checks.check_input` says what it needs of the INPUT keys."""
    augmentations = _build_scaling(cfg)
    if cfg.INPUT.CROP.ENABLED:
        # Last, so that crops are of this size whatever the scale; Detectron2's own mapper crops
        # before it resizes.
        augmentations.append(T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    return SemanticDatasetMapper(
        augmentations,
        cfg.INPUT.FORMAT,
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        cfg.INPUT.CROP.SIZE if cfg.INPUT.CROP.ENABLED else None,
        cfg.MODEL.PIXEL_MEAN,
        cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
    )


def build_semantic_test_loader(cfg, dataset_name: str) -> DataLoader:
    """Detectron2's, without the label maps: its mapper would read a palette's colours as grey."""
    records = [
        {key: value for key, value in record.items() if key != "sem_seg_file_name"}
        for record in DatasetCatalog.get(dataset_name)
    ]
    size = cfg.INPUT.FIXED_SIZE
    fixed = {"augmentations": [T.Resize(tuple(size), Image.BILINEAR)]} if size else {}
    mapper = DatasetMapper(cfg, is_train=False, **fixed)
    return build_detection_test_loader(
        records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
