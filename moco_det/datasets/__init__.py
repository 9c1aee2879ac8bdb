"""Detection data sets by name, as lists of Detectron2's standard records.

Names of Detectron2, below $DETECTRON2_DATASETS (default `datasets/`), in its layout:
    voc_2007_trainval          VOC2007/{JPEGImages,Annotations,ImageSets/Main/trainval.txt}
    coco_2017_train            coco/annotations/instances_train2017.json, coco/train2017/
    keypoints_coco_2017_train  coco/annotations/person_keypoints_train2017.json, coco/train2017/
A folder of one's own, named in the YAML or on the command line, without registration:
    voc:ROOT:SPLIT             ROOT/{JPEGImages,Annotations,ImageSets/Main/SPLIT.txt}
    coco:ANNOTATIONS.json:IMAGE_DIR
"""

import difflib
import os
from pathlib import Path

from moco_det.datasets import coco, voc
from moco_det.datasets.coco import CocoDataset, read_coco
from moco_det.datasets.dataset import Dataset, Record
from moco_det.datasets.voc import VOC_CLASSES, VocDataset
from moco_det.errors import UserError

__all__ = [
    "VOC_CLASSES",
    "CocoDataset",
    "Dataset",
    "Record",
    "VocDataset",
    "get_dataset",
    "read_coco",
]

# kind -> module with NAMES, builtin(name, root) and own(name, first part, second part)
_KINDS = {"voc": voc, "coco": coco}
_OWN_FORMS = "voc:ROOT:SPLIT or coco:ANNOTATIONS.json:IMAGE_DIR"


def data_root() -> Path:
    """The folder that holds the data sets with built-in names."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def get_dataset(name: str) -> Dataset:
    """The data set of that name; see the head of this module for the names.

    Raises `UserError` for an unknown name and for a missing file or folder.
    """
    for module in _KINDS.values():
        if name in module.NAMES:
            return module.builtin(name, data_root())
    kind, _, rest = name.partition(":")
    first, _, second = rest.rpartition(":")
    if kind in _KINDS and first and second:
        return _KINDS[kind].own(name, Path(first).expanduser(), second)
    if ":" in name:
        raise UserError(f"dataset {name!r}: a data set of one's own is written {_OWN_FORMS}")
    names = [known for module in _KINDS.values() for known in module.NAMES]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise UserError(f"no dataset {name!r}: the nearest name is {nearest}; own data: {_OWN_FORMS}")
