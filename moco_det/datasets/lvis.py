"""LVIS v0.5: COCO's images and JSON form, 1,230 classes, annotated in a federated way.

Below $DETECTRON2_DATASETS, in Detectron2's layout, lvis_v0.5_{train,val}:
    lvis/lvis_v0.5_SPLIT.json
    coco/train2017/, coco/val2017/
or `lvis:ANNOTATIONS.json:IMAGE_DIR`, where IMAGE_DIR holds these two folders or the images.

MoCo (arXiv:1911.05722, Sec. 4.2) is evaluated on v0.5. Other versions have other classes and other
images, so their numbers cannot be compared with the paper's; they are refused, by name and by the
content of the file.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from moco_det.common.errors import UserError
from moco_det.datasets.coco import CocoDataset
from moco_det.datasets.dataset import Record, require

NUM_CLASSES = 1230
_CLASSES_OF_V1 = 1203
_FREQUENCIES = {"r", "c", "f"}  # rare, common, frequent


@dataclass(frozen=True)
class LvisDataset(CocoDataset):
    """LVIS v0.5."""

    evaluator: ClassVar[str] = "lvis"
    builtin: ClassVar[dict[str, tuple[str, str]]] = {
        f"lvis_v0.5_{split}": (f"lvis/lvis_v0.5_{split}.json", "coco") for split in ("train", "val")
    }

    @classmethod
    def open(
        cls, name: str, first: Path, second: str, data_root: Path | None = None
    ) -> "LvisDataset":
        if data_root is not None:
            _, split = name.rsplit("_", 1)
            require(name, [Path(second) / f"{split}2017"], data_root)
        return super().open(name, first, second, data_root)

    @classmethod
    def _check_categories(cls, json_file: Path, categories: tuple[dict[str, Any], ...]) -> None:
        """The file names no version; its categories tell."""
        if len(categories) != NUM_CLASSES:
            version = "LVIS v1" if len(categories) == _CLASSES_OF_V1 else "not LVIS v0.5"
            raise UserError(
                f"{json_file} has {len(categories):,} categories, so it is {version}: the paper's "
                f"LVIS is v0.5, with {NUM_CLASSES:,}; take its files, lvis_v0.5_train.json and "
                "_val.json"
            )
        if any(category.get("frequency") not in _FREQUENCIES for category in categories):
            raise UserError(
                f"{json_file} is not LVIS v0.5: each of its categories has a frequency, r, c or f"
            )

    def _record(self, image: dict[str, Any], annotations: list[dict[str, Any]]) -> Record:
        """COCO's, and as in Detectron2 what is known of an image, as the file's category ids.

        "neg_category_ids": not in the image. "not_exhaustive_category_ids": in it, but not every
        object is annotated. Of all other classes without an annotation nothing is known.
        """
        known = {key: image[key] for key in ("neg_category_ids", "not_exhaustive_category_ids")}
        return super()._record(image, annotations) | known

    def _image_path(self, image: dict[str, Any]) -> Path:
        """By the URL as in Detectron2: "file_name" may be a name of 2014, "COCO_val2014_...jpg"."""
        folder, name = image["coco_url"].split("/")[-2:]
        within = self.image_dir / folder
        return (within if within.is_dir() else self.image_dir) / name


def refuse_other_versions(name: str) -> None:
    """UserError for a name of LVIS in another version, or in COCO's classes."""
    if re.match(r"lvis_(v(?!0\.5)|.*_cocofied)", name):
        raise UserError(
            f"dataset {name}: only LVIS v0.5 with its {NUM_CLASSES:,} classes is supported, on "
            "which the paper's numbers were measured (v1 has 1,203 classes and other images); the "
            f"names are {' and '.join(LvisDataset.builtin)}"
        )
