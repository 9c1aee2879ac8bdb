"""Label maps through Detectron2's data loading: what its own mapper lacks for the paper's input."""

from collections.abc import Sequence
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

from moco_det.datasets import read_labels


class RandomScale(T.Augmentation):
    """Resizes an image to its own size times a factor.

    Args:
        smallest, largest: between which the factor is drawn uniformly.
    """

    def __init__(self, smallest: float, largest: float):
        super().__init__()
        self.smallest = smallest
        self.largest = largest

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        factor = self._rand_range(self.smallest, self.largest)
        new = (max(int(side * factor + 0.5), 1) for side in (height, width))
        return T.ResizeTransform(height, width, *new, Image.BILINEAR)


class SemanticMapper:
    """Turns a record with a label map into a training input of Detectron2's SemanticSegmentor.

    Args:
        augmentations: Detectron2's, or like them.
        image_format: channel order the model wants.
        num_classes: what the labels must stay below.
        size: (height, width) to which smaller results are filled up; None: as they are.
        padding: (3,) pixel with which they are: the mean, which is 0 after normalisation.
        ignore_value: label of such pixels.
    """

    def __init__(
        self,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        num_classes: int,
        size: Sequence[int] | None,
        padding: Sequence[float],
        ignore_value: int = 255,
    ):
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.num_classes = num_classes
        self.size = size
        self.padding = np.array(padding, dtype=np.float32)
        self.ignore_value = ignore_value

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with "image" (3, H, W) and "sem_seg" (H, W) int64.

        The image is uint8, or float32 where it is padded, with a mean that is no whole number.

        Raises:
            UserError: the label map cannot be read, is of another size, or a label is no class.
        """
        image = detection_utils.read_image(record["file_name"], format=self.image_format)
        detection_utils.check_image_size(dict(record), image)
        data = T.AugInput(image, sem_seg=read_labels(record, self.num_classes))
        self.augmentations(data)
        image, labels = data.image, data.sem_seg
        if self.size is not None:
            image = fill_up(image, self.size, self.padding)
            labels = fill_up(labels, self.size, self.ignore_value)
        return {
            **record,
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "sem_seg": torch.from_numpy(labels.astype(np.int64)),
        }


def fill_up(array: np.ndarray, size: Sequence[int], value: np.ndarray | int) -> np.ndarray:
    """(h, w, ...) -> (*size, ...), with `value` below and on the right.

    An array as value gives its dtype to the result. `array` itself, where nothing is to be filled.
    """
    height, width = array.shape[:2]
    if (height, width) == tuple(size):
        return array
    dtype = value.dtype if isinstance(value, np.ndarray) else array.dtype
    filled = np.empty((*size, *array.shape[2:]), dtype=dtype)
    filled[...] = value
    filled[:height, :width] = array
    return filled


def build_semantic_mapper(cfg) -> SemanticMapper:
    """For training; `moco_det.tasks.check_input` says what it needs of the INPUT keys."""
    augmentations = detection_utils.build_augmentation(cfg, is_train=True)
    if cfg.INPUT.RANDOM_SCALE:
        augmentations[0] = RandomScale(*cfg.INPUT.RANDOM_SCALE)
    if cfg.INPUT.CROP.ENABLED:
        # Last, so that crops are of this size whatever the scale; Detectron2's own mapper crops
        # before it resizes.
        augmentations.append(T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    return SemanticMapper(
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
    mapper = DatasetMapper(cfg, is_train=False)
    return build_detection_test_loader(
        records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
