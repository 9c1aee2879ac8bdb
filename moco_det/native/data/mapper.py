"""Data set records -> model inputs, the images decoded and augmented.

    DatasetMapper          objects: resize, flip; boxes, masks, keypoints, dense pose as tensors
    SemanticDatasetMapper  label maps: scale, flip, crop, pad; or into a frame of fixed size
    DepthDatasetMapper     depth maps: into a frame of fixed size

A mapper takes a record and a random generator: what it makes is a function of these alone.

Shapes: an image (3, H, W); N objects of an image, K keypoints of an object.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from moco_det.common.errors import UserError
from moco_det.common.images import read_upright
from moco_det.config.checks import is_depth, is_per_pixel
from moco_det.datasets import get_dataset, read_depth, read_labels
from moco_det.densepose.body import load_symmetries
from moco_det.densepose.points import DensePosePoints, Symmetries, has_points, read_points
from moco_det.native.data.transforms import (
    Augmentation,
    FixedSize,
    FramedTransform,
    RandomCrop,
    RandomFrame,
    RandomScale,
    ScaleChoice,
    Transform,
)
from moco_det.native.modeling.pixel_input import pad

MIN_SIDE = 1e-5  # pixels; a box thinner than this after clipping holds nothing (Detectron2's value)

Polygons = list[np.ndarray]  # of one object; each [x0, y0, x1, y1, ...] float64


def read_record_image(record: dict) -> Image.Image:
    """RGB and upright.

    Raises:
        UserError: it cannot be read or is not of the size that the record states.
    """
    image = read_upright(record["file_name"])
    width, height = image.size
    if (record["width"], record["height"]) != (width, height):
        raise UserError(
            f"{record['file_name']} is {width}x{height} pixels (upright), its annotation says "
            f"{record['width']}x{record['height']}: correct the annotation or the image"
        )
    return image


# -- objects --------------------------------------------------------------------------------------


@dataclass
class DatasetMapper:
    """Turns a Detectron2 standard dict into a model input.

    Args:
        augmentation: draws the `Transform`.
        image_format: channel order the model wants, "BGR" or "RGB".
        with_targets: also produce "gt_boxes" (N, 4) float32 and "gt_classes" (N,) int64, without
            crowds and without objects whose box or mask clipping left empty.
        with_masks: "gt_masks" among the targets, in `mask_format`: "polygon" for a list of
            `Polygons` per object, "bitmask" for a bool tensor (N, H, W).
        with_keypoints: "gt_keypoints" (N, K, 3) float32 among the targets: x, y, visibility.
        with_densepose: "gt_densepose" among the targets: a `DensePosePoints` for each object, None
            for those that are not annotated.
        mirrored_keypoints: K numbers; see `Transform.apply_keypoints`.
        symmetries: of the body's surface; None if no image is flipped.
    """

    augmentation: Augmentation | FixedSize
    image_format: str
    with_targets: bool
    with_masks: bool = False
    with_keypoints: bool = False
    mask_format: str = "polygon"
    mirrored_keypoints: Sequence[int] = ()
    with_densepose: bool = False
    symmetries: Symmetries | None = None

    def __call__(self, record: dict, rng: np.random.Generator) -> dict:
        """The model's input; "image" is uint8 (3, H, W), "height" and "width" are the original's.

        Raises:
            UserError: the image cannot be read or is not of the size its annotation states, an
                object lacks the mask or the keypoints that were asked for, or its dense pose is
                malformed.
        """
        image = read_record_image(record)
        transform = self.augmentation.draw(rng, image.height, image.width)
        pixels = torch.from_numpy(transform.apply_image(image, self.image_format))
        item = {key: record[key] for key in ("image_id", "height", "width")} | {"image": pixels}
        if self.with_targets:
            try:
                item |= self._targets(record["annotations"], transform)
            except UserError as error:
                raise UserError(f"{record['file_name']}: {error}") from error
        return item

    def _targets(self, annotations: list[dict], transform: Transform) -> dict:
        objects = [a for a in annotations if not a.get("iscrowd", 0)]
        boxes = np.array([a["bbox"] for a in objects], dtype=np.float64).reshape(-1, 4)
        boxes = torch.from_numpy(transform.apply_box(boxes)).float()
        classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
        keep = (boxes[:, 2:] - boxes[:, :2] > MIN_SIDE).all(dim=1)
        targets = {"gt_boxes": boxes, "gt_classes": classes}
        if self.with_keypoints:
            targets["gt_keypoints"] = self._keypoints(objects, transform)
        if self.with_densepose:
            targets["gt_densepose"] = [self._dense_pose(a, transform) for a in objects]
        if self.with_masks:
            make_masks = bit_masks if self.mask_format == "bitmask" else polygon_masks
            masks = targets["gt_masks"] = make_masks(objects, transform)
            keep &= torch.tensor([_is_filled(mask) for mask in masks], dtype=torch.bool)
        return {name: _select(values, keep) for name, values in targets.items()}

    def _keypoints(self, objects: list[dict], transform: Transform) -> Tensor:
        count = len(self.mirrored_keypoints)
        rows = [a.get("keypoints", ()) for a in objects]
        if any(len(row) != 3 * count for row in rows):
            raise UserError(f"an object does not have the {count} keypoints of its data set")
        points = np.array(rows, dtype=np.float64).reshape(-1, count, 3)
        return torch.from_numpy(transform.apply_keypoints(points, self.mirrored_keypoints)).float()

    def _dense_pose(self, annotation: dict, transform: Transform) -> DensePosePoints | None:
        if not has_points(annotation):
            return None
        points = read_points(annotation)
        return points.mirrored(self.symmetries) if transform.flip else points


def _is_filled(mask: Tensor | Polygons) -> bool:
    return bool(mask.any()) if isinstance(mask, Tensor) else len(mask) > 0


def _select(values: Tensor | list, keep: Tensor) -> Tensor | list:
    if isinstance(values, Tensor):
        return values[keep]
    return [value for value, kept in zip(values, keep.tolist(), strict=True) if kept]


def _segmentation(annotation: dict) -> list | dict:
    if "segmentation" not in annotation:
        raise UserError("an object has no segmentation, which MODEL.MASK_ON needs")
    return annotation["segmentation"]


def polygon_masks(objects: list[dict], transform: Transform) -> list[Polygons]:
    """The objects' outlines on the new image, as they are: not clipped to it."""
    segmentations = [_segmentation(a) for a in objects]
    if any(isinstance(shape, dict) for shape in segmentations):
        raise UserError("a mask is run-length encoded: set INPUT.MASK_FORMAT bitmask")
    return [transform.apply_polygons(shape) for shape in segmentations]


def bit_masks(objects: list[dict], transform: Transform) -> Tensor:
    """The objects' pixels on the new image, bool (N, H, W)."""
    masks = torch.zeros((len(objects), *transform.new), dtype=torch.bool)
    for mask, annotation in zip(masks, objects, strict=True):
        mask.copy_(torch.from_numpy(_bit_mask(_segmentation(annotation), transform)))
    return masks


def _bit_mask(segmentation: list | dict, transform: Transform) -> np.ndarray:
    """uint8 (H, W). An RLE is decoded and then resized, polygons are resized and then drawn."""
    if isinstance(segmentation, dict):
        try:
            mask = coco_mask.decode(segmentation)
        except (TypeError, ValueError) as error:
            raise UserError(f"a run-length encoded mask is broken: {error}") from error
        if mask.shape != transform.old:
            raise UserError(f"a mask is of size {mask.shape}, the image of {transform.old}")
        return transform.apply_segmentation(mask)
    if not segmentation:
        return np.zeros(transform.new, dtype=np.uint8)
    polygons = transform.apply_polygons(segmentation)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *transform.new)))


def mirrored_keypoints(names: Sequence[str]) -> tuple[int, ...]:
    """For each keypoint of the data sets `names`, the one that takes its place in a mirror.

    Raises:
        UserError: a data set has no names of keypoints, or others than the first.
    """
    datasets = [get_dataset(name) for name in names]
    keypoints = datasets[0].keypoint_names
    for dataset in datasets:
        if not keypoints or dataset.keypoint_names != keypoints:
            raise UserError(
                f"dataset {dataset.name} names the keypoints {dataset.keypoint_names}: "
                "MODEL.KEYPOINT_ON needs one list of names, the same in all of DATASETS.TRAIN"
            )
    partner = dict(datasets[0].keypoint_flips)
    partner |= {right: left for left, right in partner.items()}
    return tuple(keypoints.index(partner.get(name, name)) for name in keypoints)


# -- label maps, depth maps -----------------------------------------------------------------------


@dataclass
class SemanticDatasetMapper:
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

    augmentation: Augmentation | RandomScale | ScaleChoice | RandomFrame
    crop: RandomCrop | None
    image_format: str
    num_classes: int
    padding: Sequence[float]
    ignore_value: int = 255

    def __post_init__(self):
        self.padding = torch.tensor(self.padding, dtype=torch.float32).view(3, 1, 1)

    def __call__(self, record: dict, rng: np.random.Generator) -> dict:
        """The model's input: "image" (3, H, W), "sem_seg" (H, W) int64, and of the record
        "image_id", "height", "width". (H, W) is the crop's size, where there is a crop.

        The image is uint8, or float32 where it is padded, with a mean that is no whole number.

        Raises:
            UserError: a file cannot be read, sizes differ, or a label is no class.
        """
        image = read_record_image(record)
        transform = self.augmentation.draw(rng, image.height, image.width)
        pixels = transform.apply_image(image, self.image_format)
        labels = transform.apply_segmentation(read_labels(record, self.num_classes))
        if self.crop is not None:
            rows, columns = self.crop.draw(rng, *transform.new)
            pixels, labels = pixels[:, rows, columns], labels[rows, columns]
        pixels = torch.from_numpy(np.ascontiguousarray(pixels))
        labels = torch.from_numpy(labels.astype(np.int64))
        if self.crop is not None:
            pixels = pad(pixels, self.crop.size, self.padding)
            labels = pad(labels, self.crop.size, self.ignore_value)
        item = {key: record[key] for key in ("image_id", "height", "width")}
        return item | {"image": pixels, "sem_seg": labels}


@dataclass
class DepthDatasetMapper:
    """Turns a record with a depth map into a training input of a `DepthEstimator`.

    Args:
        augmentation: draws zoom, angle and flip.
        image_format: channel order the model wants, "BGR" or "RGB".
    """

    augmentation: RandomFrame
    image_format: str

    def __call__(self, record: dict, rng: np.random.Generator) -> dict:
        """The model's input: "image" uint8 (3, H, W), "depth" (H, W) float32 in metres, 0 where
        none is known, and of the record "image_id", "height", "width".

        Raises:
            UserError: a file cannot be read, sizes differ, or a depth is none.
        """
        image = read_record_image(record)
        transform: FramedTransform = self.augmentation.draw(rng, image.height, image.width)
        item = {key: record[key] for key in ("image_id", "height", "width")}
        item["image"] = torch.from_numpy(transform.apply_image(image, self.image_format))
        item["depth"] = torch.from_numpy(transform.apply_depth(read_depth(record)))
        return item


# -- from a config --------------------------------------------------------------------------------


def build_train_mapper(cfg) -> DatasetMapper | SemanticDatasetMapper | DepthDatasetMapper:
    """The mapper of what the model of `cfg` is trained on."""
    if is_depth(cfg):
        return DepthDatasetMapper(_build_frame(cfg), cfg.INPUT.FORMAT)
    if is_per_pixel(cfg):
        return build_semantic_mapper(cfg)
    model, flip = cfg.MODEL, _flips(cfg)
    return DatasetMapper(
        _build_augmentation(cfg),
        cfg.INPUT.FORMAT,
        with_targets=True,
        with_masks=model.MASK_ON,
        with_keypoints=model.KEYPOINT_ON,
        mask_format=cfg.INPUT.MASK_FORMAT,
        mirrored_keypoints=mirrored_keypoints(cfg.DATASETS.TRAIN) if model.KEYPOINT_ON else (),
        with_densepose=model.DENSEPOSE_ON,
        symmetries=load_symmetries() if model.DENSEPOSE_ON and flip else None,
    )


def build_test_mapper(cfg) -> DatasetMapper:
    if cfg.INPUT.FIXED_SIZE:
        augmentation = FixedSize(tuple(cfg.INPUT.FIXED_SIZE))
    else:
        augmentation = Augmentation((cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST)
    return DatasetMapper(augmentation, cfg.INPUT.FORMAT, with_targets=False)


def build_semantic_mapper(cfg) -> SemanticDatasetMapper:
    """For training; `moco_det.config.checks.check_input` says what it needs of the INPUT keys."""
    crop = cfg.INPUT.CROP
    return SemanticDatasetMapper(
        _build_scaling(cfg),
        RandomCrop(tuple(crop.SIZE)) if crop.ENABLED else None,
        cfg.INPUT.FORMAT,
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        cfg.MODEL.PIXEL_MEAN,
        cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
    )


def _build_scaling(cfg) -> Augmentation | RandomScale | ScaleChoice | RandomFrame:
    """The resize and flip of the training images of a model of pixels."""
    scale, choices, crop = cfg.INPUT.RANDOM_SCALE, cfg.INPUT.SCALE_CHOICES, cfg.INPUT.CROP
    if cfg.INPUT.FIXED_SIZE:
        return _build_frame(cfg)
    if choices:
        window = tuple(crop.SIZE) if crop.ENABLED else ()
        return ScaleChoice(tuple(choices), window, flip=_flips(cfg))
    return RandomScale(*scale, flip=_flips(cfg)) if scale else _build_augmentation(cfg)


def _build_frame(cfg) -> RandomFrame:
    mean = tuple(round(value) for value in cfg.MODEL.PIXEL_MEAN)
    return RandomFrame(
        tuple(cfg.INPUT.FIXED_SIZE),
        fill=mean[::-1] if cfg.INPUT.FORMAT == "BGR" else mean,
        scale=tuple(cfg.INPUT.RANDOM_SCALE),
        choices=tuple(cfg.INPUT.SCALE_CHOICES),
        rotation=cfg.INPUT.RANDOM_ROTATION,
        flip=_flips(cfg),
    )


def _build_augmentation(cfg) -> Augmentation:
    """The training images' resize and flip."""
    sizes, sampling = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    return Augmentation(sizes, cfg.INPUT.MAX_SIZE_TRAIN, sampling, flip=_flips(cfg))


def _flips(cfg) -> bool:
    return cfg.INPUT.RANDOM_FLIP == "horizontal"
