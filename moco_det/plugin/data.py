"""The data sets of `moco_det.datasets` in Detectron2's catalogs.

Label maps through Detectron2's data loading: what its own mapper lacks for the paper's input.
"""

from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    detection_utils,
)
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from PIL import Image
from torch.utils.data import DataLoader

from moco_det.common.errors import UserError
from moco_det.config.checks import is_semantic, num_classes, num_classes_key
from moco_det.datasets import (
    CityscapesDataset,
    CocoDataset,
    Dataset,
    DensePoseDataset,
    LvisDataset,
    SemanticDataset,
    VocDataset,
    get_dataset,
    read_labels,
)
from moco_det.datasets.semantic import IGNORED
from moco_det.densepose import body

# Names that Detectron2 knows and `moco_det.datasets` reads all the same. Its readers of Cityscapes
# import a package that is not public, and need the polygons; its LVIS takes versions that are none
# of the paper's; its DensePose sets are for that project's own loader. So both engines train on the
# same records.
_READ_HERE = ("lvis_", "cityscapes_", "densepose_")


def register_datasets(names: Iterable[str]) -> None:
    """Register those of `names` that Detectron2 does not know, or does not read as they should be.

    Raises:
        UserError: an unknown name; a missing file or folder.
    """
    for name in names:
        read_here = name.startswith(_READ_HERE)
        if name in DatasetCatalog and not read_here:
            continue
        dataset = get_dataset(name)
        if read_here:
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)
        register(dataset)


def register(dataset: Dataset) -> None:
    """Put the records of `dataset`, and what Detectron2's evaluators ask of it, in the catalogs.

    COCO's instances go through Detectron2's own reader, everything else through ours.

    Raises:
        UserError: an annotation that Detectron2's evaluator cannot read.
    """
    if isinstance(dataset, VocDataset):
        _require_tags(dataset)
    if type(dataset) is CocoDataset:
        register_coco_instances(dataset.name, {}, str(dataset.json_file), str(dataset.image_dir))
    else:
        DatasetCatalog.register(dataset.name, lambda: _records(dataset))
    MetadataCatalog.get(dataset.name).set(**_metadata(dataset))


def _records(dataset: Dataset) -> list[dict]:
    records = dataset.records()
    for record in records:
        for annotation in record.get("annotations", ()):
            annotation["bbox_mode"] = BoxMode.XYXY_ABS
    return records


def _metadata(dataset: Dataset) -> dict[str, Any]:
    """Of one data set, as Detectron2's evaluators of its kind call it."""
    classes = list(dataset.classes)
    match dataset:
        case SemanticDataset():
            names = {"stuff_classes": classes, "ignore_label": IGNORED}
            return {**names, "evaluator_type": "sem_seg"}
        case VocDataset():
            kind = {
                "dirname": str(dataset.root),
                "split": dataset.split,
                "year": 2007 if dataset.eleven_point else 2012,  # which metric
                "evaluator_type": "pascal_voc",
            }
        case CityscapesDataset():
            kind = {
                "image_dir": str(dataset.image_dir),
                "gt_dir": str(dataset.label_dir),
                "evaluator_type": "cityscapes_instance",
            }
        case DensePoseDataset() | LvisDataset():
            kind = {
                "json_file": str(dataset.json_file),
                "image_root": str(dataset.image_dir),
                "evaluator_type": dataset.evaluator,
            }
            if isinstance(dataset, DensePoseDataset):
                kind["densepose_transform_src"] = str(body.file_path(body.SYMMETRIES))
        case CocoDataset():  # all but the classes is set by `register_coco_instances`
            kind = {}
            if dataset.keypoint_names:
                kind["keypoint_names"] = list(dataset.keypoint_names)
                kind["keypoint_flip_map"] = list(dataset.keypoint_flips)
    return {"thing_classes": classes, **kind}


def _require_tags(dataset: VocDataset) -> None:
    """UserError where Detectron2's evaluator would stumble over an annotation."""
    for path in sorted((dataset.root / "Annotations").glob("*.xml")):
        for node in ElementTree.parse(path).findall("object"):
            for tag in ("pose", "truncated", "difficult"):
                if node.find(tag) is None:
                    raise UserError(
                        f"{path}: an <object> without <{tag}>, which Detectron2's VOC evaluator "
                        "reads: add it, or use --engine native"
                    )


def check_classes(cfg) -> None:
    """UserError unless every data set has what the model learns, and as many classes as it."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        if (metadata.get("evaluator_type") == "sem_seg") != is_semantic(cfg):
            raise UserError(
                f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} and dataset {name} do not "
                "fit: SemanticSegmentor learns from label maps, all others from objects"
            )
        classes = metadata.get("stuff_classes" if is_semantic(cfg) else "thing_classes")
        if classes and len(classes) != num_classes(cfg):
            raise UserError(
                f"{num_classes_key(cfg)} is {num_classes(cfg)}, but {name} has {len(classes)} "
                f"classes ({', '.join(classes[:20])}): set it to {len(classes)}"
            )


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


class SemanticDatasetMapper:
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


def build_semantic_mapper(cfg) -> SemanticDatasetMapper:
    """For training; `moco_det.config.checks.check_input` says what it needs of the INPUT keys."""
    augmentations = detection_utils.build_augmentation(cfg, is_train=True)
    if cfg.INPUT.RANDOM_SCALE:
        augmentations[0] = RandomScale(*cfg.INPUT.RANDOM_SCALE)
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
    mapper = DatasetMapper(cfg, is_train=False)
    return build_detection_test_loader(
        records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
