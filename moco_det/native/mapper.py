"""A dataset record to what the detector eats: decode, resize, flip, boxes to tensors."""

import numpy as np
import torch

from moco_det.errors import UserError
from moco_det.native.transforms import Augmentation, read_image

MIN_SIDE = 1e-5  # pixels; a box thinner than this after clipping holds nothing (Detectron2's value)


class Mapper:
    """Turns a Detectron2 standard dict into a model input.

    Args:
        augmentation: draws the geometry.
        image_format: channel order the model wants, "BGR" or "RGB".
        with_targets: also produce "gt_boxes" (N, 4) float32 and "gt_classes" (N,) int64, without
            crowds and without boxes that clipping left empty.
    """

    def __init__(self, augmentation: Augmentation, image_format: str, with_targets: bool):
        self.augmentation = augmentation
        self.image_format = image_format
        self.with_targets = with_targets

    def __call__(self, record: dict, rng: np.random.Generator) -> dict:
        """The model's input; "image" is uint8 (3, H, W), "height" and "width" are the original's.

        Raises:
            UserError: the image cannot be read or is not of the size its annotation states.
        """
        image = read_image(record["file_name"])
        width, height = image.size
        if (record["width"], record["height"]) != (width, height):
            raise UserError(
                f"{record['file_name']} is {width}x{height} pixels (upright), its annotation says "
                f"{record['width']}x{record['height']}: correct the annotation or the image"
            )
        geometry = self.augmentation.draw(rng, height, width)
        pixels = torch.from_numpy(geometry.apply_image(image, self.image_format))
        item = {key: record[key] for key in ("image_id", "height", "width")} | {"image": pixels}
        if self.with_targets:
            item |= self._targets(record["annotations"], geometry)
        return item

    @staticmethod
    def _targets(annotations: list[dict], geometry) -> dict[str, torch.Tensor]:
        objects = [a for a in annotations if not a.get("iscrowd", 0)]
        boxes = np.array([a["bbox"] for a in objects], dtype=np.float64).reshape(-1, 4)
        boxes = torch.from_numpy(geometry.apply_boxes(boxes)).float()
        classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
        keep = (boxes[:, 2:] - boxes[:, :2] > MIN_SIDE).all(dim=1)
        return {"gt_boxes": boxes[keep], "gt_classes": classes[keep]}


def build_train_mapper(cfg) -> Mapper:
    augmentation = Augmentation(
        cfg.INPUT.MIN_SIZE_TRAIN,
        cfg.INPUT.MAX_SIZE_TRAIN,
        cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
        flip=cfg.INPUT.RANDOM_FLIP == "horizontal",
    )
    return Mapper(augmentation, cfg.INPUT.FORMAT, with_targets=True)


def build_test_mapper(cfg) -> Mapper:
    augmentation = Augmentation((cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST)
    return Mapper(augmentation, cfg.INPUT.FORMAT, with_targets=False)
