"""Semantic segmentation: a label map beside each image. PASCAL VOC and Cityscapes.

Any data set with a map of values beside each image is a `MappedDataset`: NYU Depth v2 (`nyud.py`)
makes two of them.

PASCAL VOC, below $DETECTRON2_DATASETS, or `voc_sem_seg:ROOT:SPLIT` in a folder of its layout:
    voc_2012_sem_seg_{train,val,trainval}
        VOC2012/JPEGImages/ID.jpg
        VOC2012/SegmentationClass/ID.png             palette images: 0 background, 1-20, 255 void
        VOC2012/ImageSets/Segmentation/SPLIT.txt     1,464, 1,449 and 2,913 lines
    voc_2012_sem_seg_train_aug
        VOC2012/JPEGImages/ID.jpg
        VOC2012/SegmentationClassAug/ID.png          grey or palette images, the same numbers
        VOC2012/ImageSets/Segmentation/train_aug.txt

The 10,582 images of train_aug ("train_aug2012" of MoCo, arXiv:1911.05722, appendix A.5) are VOC
2012's 1,464 segmentation training images and, of the Semantic Boundaries Dataset (SBD: Hariharan et
al., "Semantic contours from inverse detectors", ICCV 2011), all 9,118 images of its train and val
that are in neither train nor val of VOC 2012's segmentation. Neither VOC nor SBD distributes that
list or the label maps as images. The list is the `trainaug.txt` or `train_aug.txt` that came with
DeepLab (Chen et al.) and is passed on with most segmentation code; it can also be built from the
two sets' own lists. The label maps are VOC's own where they exist, elsewhere the matrix
`GTcls.Segmentation` of SBD's `dataset/cls/ID.mat`, written as an 8-bit PNG. SBD's images are all
in VOC's JPEGImages.

Cityscapes, or `cityscapes_sem_seg:ROOT:SPLIT` in a folder of its layout:
    cityscapes_fine_sem_seg_{train,val}
        cityscapes/leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png
        cityscapes/gtFine/SPLIT/CITY/ID_gtFine_labelTrainIds.png, or ..._labelIds.png
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from moco_det.common.errors import UserError
from moco_det.common.images import UnreadableImage, image_size, read_label_map
from moco_det.datasets.cityscapes import CityscapesLayout
from moco_det.datasets.dataset import (
    BUILT_IN,
    NOTHING,
    Dataset,
    Record,
    SplitLayout,
    Wanted,
)
from moco_det.datasets.problems import Problems, refuse_each
from moco_det.datasets.voc import VOC_CLASSES, read_split

IGNORED = 255  # in a label map: void, or a class that the benchmark does not have
_TRAIN_AUG = "voc_2012_sem_seg_train_aug"

SEMANTIC_VOC_CLASSES = ("background", *VOC_CLASSES)

# labelId -> class of the 19 that the benchmark evaluates; trainIds count them in this order
# (cityscapesscripts.helpers.labels).
# fmt: off
CITYSCAPES_LABEL_IDS = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}
# fmt: on
_TRAIN_ID_OF = np.full(256, IGNORED, dtype=np.uint8)
_TRAIN_ID_OF[list(CITYSCAPES_LABEL_IDS)] = range(len(CITYSCAPES_LABEL_IDS))

_LABEL_IDS = "_gtFine_labelIds.png"


@dataclass(frozen=True)
class MappedDataset(Dataset):
    """Images with a map each; `root` and `split` say where, the subclasses in which layout.

    `map_key`: under which a record names the file of its map.
    """

    form: ClassVar[str] = "ROOT:SPLIT"
    map_key: ClassVar[str]
    root: Path
    split: str

    def records(self, problems: Problems | None = None, wanted: Wanted = NOTHING) -> list[Record]:
        """{"file_name", "image_id", "height", "width", `map_key`}; see `read_map`.

        The image id is what the image and its map are both called.

        Raises:
            UserError: an image without a map, or the reverse; no image at all.
        """
        problems, records = problems or Problems(), []
        for image_id, image, values in self.pairs(problems):
            try:
                height, width = image_size(image)
            except UnreadableImage as error:
                problems.refuse("image", f"{image} cannot be decoded: {error.reason}")
                continue
            records.append(
                {
                    "file_name": str(image),
                    "image_id": image_id,
                    "height": height,
                    "width": width,
                    self.map_key: str(values),
                }
            )
        return records

    def pairs(self, problems: Problems | None = None) -> Iterable[tuple[str, Path, Path]]:
        """(image id, image, map), both of which exist, always in the same order."""
        raise NotImplementedError

    def read_map(self, record: Record) -> np.ndarray:
        """The map (H, W) of one of the records. Raises UserError."""
        raise NotImplementedError


@dataclass(frozen=True)
class SemanticDataset(MappedDataset):
    """Images with label maps.

    `all_classes` are those of every data set of the kind.
    """

    evaluator: ClassVar[str] = "sem_seg"
    map_key: ClassVar[str] = "sem_seg_file_name"
    all_classes: ClassVar[tuple[str, ...]]

    def read_map(self, record: Record) -> np.ndarray:
        """See `read_labels`."""
        return read_labels(record, len(self.classes))


@dataclass(frozen=True)
class SemanticVocDataset(SplitLayout, SemanticDataset):
    """VOC's layout."""

    all_classes: ClassVar[tuple[str, ...]] = SEMANTIC_VOC_CLASSES

    @classmethod
    def open(
        cls,
        name: str,
        first: Path,
        second: str,
        data_root: Path | None = None,
        problems: Problems | None = None,
    ) -> Dataset:
        try:
            return super().open(name, first, second, data_root, problems)
        except UserError as error:
            if not second.endswith("_aug"):
                raise
            raise UserError(
                f"{error}. The list and the label maps are not part of VOC: they add the images of "
                "SBD (Hariharan et al., 2011); moco_det/datasets/semantic.py says what goes where"
            ) from error

    @property
    def required(self) -> tuple[Path, ...]:
        return self.image_dir, self.split_file, self.label_dir

    @property
    def image_dir(self) -> Path:
        return self.root / "JPEGImages"

    @property
    def split_file(self) -> Path:
        return self.root / "ImageSets" / "Segmentation" / f"{self.split}.txt"

    @property
    def label_dir(self) -> Path:
        augmented = self.split.endswith("_aug")
        return self.root / ("SegmentationClassAug" if augmented else "SegmentationClass")

    def paths(self, image_id: str) -> tuple[Path, Path]:
        """Where an image and its label map belong."""
        return self.image_dir / f"{image_id}.jpg", self.label_dir / f"{image_id}.png"

    def pairs(self, problems: Problems | None = None) -> list[tuple[str, Path, Path]]:
        """As in the list, of which a line is an id, or in some lists of train_aug two paths."""
        problems = problems or Problems()
        image_ids = read_split(self.split_file, problems, bare=True)
        problems.listed(len(image_ids))
        if not image_ids:
            text = f"dataset {self.name}: no image in {self.root}, split {self.split}"
            problems.refuse("list", text)
        published = BUILT_IN[_TRAIN_AUG].images
        if self.name == _TRAIN_AUG and len(image_ids) != published:
            text = (
                f"dataset {self.name}: {self.split_file} lists {len(image_ids)} images, the "
                f"published list {published}; name a list of your own voc_sem_seg:ROOT:SPLIT"
            )
            problems.refuse("count", text)
        paths = [(image_id, *self.paths(image_id)) for image_id in image_ids]
        return existing(paths, self.split_file, (self.image_dir, self.label_dir), problems)


def existing(
    paths: Sequence[tuple[str, Path, Path]],
    split_file: Path,
    folders: tuple[Path, Path],
    problems: Problems,
    kind: str = "labels",
) -> list[tuple[str, Path, Path]]:
    """Those (image id, image, map) of a list whose files exist; `problems` is told of the others.

    Args:
        folders: of the images and of the maps.
        kind: of the maps, as a problem calls it.
    """
    images, maps = (set(os.listdir(folder)) for folder in folders)
    lists = f"{split_file} lists"
    no_image = [f"{lists} {i}, but there is no {x}" for i, x, _ in paths if x.name not in images]
    no_map = [f"{lists} {i}, but there is no {y}" for i, _, y in paths if y.name not in maps]
    refuse_each("image", no_image, problems)
    refuse_each(kind, no_map, problems)
    return [path for path in paths if path[1].name in images and path[2].name in maps]


@dataclass(frozen=True)
class SemanticCityscapesDataset(CityscapesLayout, SemanticDataset):
    """Cityscapes' layout, with trainIds, or where an image has none, labelIds."""

    all_classes: ClassVar[tuple[str, ...]] = tuple(CITYSCAPES_LABEL_IDS.values())
    label_endings: ClassVar[tuple[str, ...]] = ("_gtFine_labelTrainIds.png", _LABEL_IDS)


def read_labels(record: Record, num_classes: int | None = None) -> np.ndarray:
    """The label map of a record, uint8 (H, W): a class for each pixel, or `IGNORED`.

    A file of Cityscapes' labelIds is brought to trainIds.

    Args:
        record: "sem_seg_file_name"; where class 0 has another number in the file, "first_label",
            below which pixels are ignored; and, to be checked, "height" and "width".
        num_classes: what the labels must stay below; None: they are not checked.

    Raises:
        UserError: the file cannot be read, holds no labels of 8 bits, is not of the record's size,
            or has a label that is not a class.
    """
    path = record["sem_seg_file_name"]
    mode, labels = read_label_map(path)
    if mode not in ("L", "P"):
        raise UserError(
            f"label map {path} is of Pillow's mode {mode}: it needs one channel of 8 bits (mode L "
            "or P) that holds the classes themselves, not colours"
        )
    if "height" in record and labels.shape != (record["height"], record["width"]):
        raise UserError(
            f"label map {path} is {labels.shape[1]}x{labels.shape[0]} pixels, its image "
            f"{record['file_name']} {record['width']}x{record['height']}"
        )
    if path.endswith(_LABEL_IDS):
        labels = _TRAIN_ID_OF[labels]
    first = record.get("first_label", 0)
    if num_classes is not None:
        _check_labels(labels, first, num_classes, path)
    if first:
        known = (labels >= first) & (labels != IGNORED)
        labels = np.where(known, labels - np.uint8(first), np.uint8(IGNORED))
    return labels


def _check_labels(labels: np.ndarray, first: int, num_classes: int, path: str) -> None:
    unknown = np.unique(labels[(labels >= first + num_classes) & (labels != IGNORED)])
    if len(unknown):
        ignored = f"{IGNORED}, and what is below {first}," if first else f"and {IGNORED}"
        raise UserError(
            f"label map {path} holds the label {unknown[0]}, but there are {num_classes} classes "
            f"({first} to {first + num_classes - 1}, {ignored} for what is ignored)"
        )
