"""A semantic record to what the segmentor learns from: decode, scale, flip, crop, pad."""

import numpy as np
import torch
from torch import Tensor

from moco_det.datasets import read_labels
from moco_det.native.mapper import read_record_image
from moco_det.native.transforms import Augmentation, RandomCrop, RandomScale


class SemanticMapper:
    """Turns a record with a label map into a training input of a `SemanticSegmentor`.

    Args:
        augmentation: draws size and flip.
        crop: draws the window; None: all of the image is used.
        image_format: channel order the model wants, "BGR" or "RGB".
        num_classes: what the labels must stay below.
        padding: (3,) pixel, in that order, with which an image is made as large as the crop. The
            mean pixel is what the literature takes: it is 0 after normalisation.
        ignore_value: label of such pixels.
    """

    def __init__(
        self,
        augmentation: Augmentation | RandomScale,
        crop: RandomCrop | None,
        image_format: str,
        num_classes: int,
        padding: tuple[float, float, float],
        ignore_value: int = 255,
    ):
        self.augmentation = augmentation
        self.crop = crop
        self.image_format = image_format
        self.num_classes = num_classes
        self.padding = torch.tensor(padding, dtype=torch.float32).view(3, 1, 1)
        self.ignore_value = ignore_value

    def __call__(self, record: dict, rng: np.random.Generator) -> dict:
        """The model's input: "image" (3, H, W), "sem_seg" (H, W) int64, and of the record
        "image_id", "height", "width". (H, W) is the crop's size, where there is a crop.

        The image is uint8, or float32 where it is padded, with a mean that is no whole number.

        Raises:
            UserError: a file cannot be read, sizes differ, or a label is no class.
        """
        image = read_record_image(record)
        geometry = self.augmentation.draw(rng, image.height, image.width)
        pixels = geometry.apply_image(image, self.image_format)
        labels = geometry.apply_mask(read_labels(record, self.num_classes))
        if self.crop is not None:
            rows, columns = self.crop.draw(rng, *geometry.new)
            pixels, labels = pixels[:, rows, columns], labels[rows, columns]
        pixels = torch.from_numpy(np.ascontiguousarray(pixels))
        labels = torch.from_numpy(labels.astype(np.int64))
        if self.crop is not None:
            pixels = pad(pixels, self.crop.size, self.padding)
            labels = pad(labels, self.crop.size, self.ignore_value)
        item = {key: record[key] for key in ("image_id", "height", "width")}
        return item | {"image": pixels, "sem_seg": labels}


def pad(x: Tensor, size: tuple[int, int], value: Tensor | int) -> Tensor:
    """(..., h, w) -> (..., *size), filled with `value` below and on the right.

    A tensor as value gives its dtype to the result. `x` itself, where there is nothing to fill.
    """
    height, width = x.shape[-2:]
    if (height, width) == tuple(size):
        return x
    dtype = value.dtype if isinstance(value, Tensor) else x.dtype
    padded = torch.empty((*x.shape[:-2], *size), dtype=dtype)
    padded[...] = value
    padded[..., :height, :width] = x
    return padded


def build_semantic_mapper(cfg) -> SemanticMapper:
    """For training; `moco_det.tasks.check_input` says what it needs of the INPUT keys."""
    flip = cfg.INPUT.RANDOM_FLIP == "horizontal"
    if cfg.INPUT.RANDOM_SCALE:
        augmentation = RandomScale(*cfg.INPUT.RANDOM_SCALE, flip=flip)
    else:
        augmentation = Augmentation(
            cfg.INPUT.MIN_SIZE_TRAIN,
            cfg.INPUT.MAX_SIZE_TRAIN,
            cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
            flip=flip,
        )
    return SemanticMapper(
        augmentation,
        RandomCrop(cfg.INPUT.CROP.SIZE) if cfg.INPUT.CROP.ENABLED else None,
        cfg.INPUT.FORMAT,
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        cfg.MODEL.PIXEL_MEAN,
        cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
    )
