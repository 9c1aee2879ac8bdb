"""Detection data sets by name, as lists of Detectron2's standard records.

Names of Detectron2, below $DETECTRON2_DATASETS (default `datasets/`), in its layout:
    voc_2007_trainval          VOC2007/{JPEGImages,Annotations,ImageSets/Main/trainval.txt}
    coco_2017_train            coco/annotations/instances_train2017.json, coco/train2017/
    keypoints_coco_2017_train  coco/annotations/person_keypoints_train2017.json, coco/train2017/
    densepose_coco_2014_train  coco/annotations/densepose_train2014.json, coco/train2014/, see
                               `datasets.densepose`
    lvis_v0.5_train            lvis/lvis_v0.5_train.json, coco/train2017/
    cityscapes_fine_instance_seg_train
                               cityscapes/{leftImg8bit,gtFine}/train/, see `datasets.cityscapes`
A folder of one's own, named in the YAML or on the command line, without registration:
    voc:ROOT:SPLIT             ROOT/{JPEGImages,Annotations,ImageSets/Main/SPLIT.txt}
    coco:ANNOTATIONS.json:IMAGE_DIR
    densepose:ANNOTATIONS.json:IMAGE_DIR
    lvis:ANNOTATIONS.json:IMAGE_DIR
    cityscapes:ROOT:SPLIT      ROOT/{leftImg8bit,gtFine}/SPLIT/
    voc_sem_seg:ROOT:SPLIT, cityscapes_sem_seg:ROOT:SPLIT: see `moco_det.datasets.semantic`, which
    also says where voc_2012_sem_seg_SPLIT and cityscapes_fine_sem_seg_SPLIT are looked for
"""

import difflib
import os
from pathlib import Path

from moco_det.common.errors import UserError
from moco_det.datasets import cityscapes, coco, densepose, lvis, semantic, voc
from moco_det.datasets.cityscapes import CityscapesDataset
from moco_det.datasets.coco import CocoDataset, read_coco
from moco_det.datasets.dataset import Dataset, Record
from moco_det.datasets.densepose import DensePoseDataset
from moco_det.datasets.lvis import LvisDataset
from moco_det.datasets.semantic import SemanticDataset, read_labels
from moco_det.datasets.voc import VOC_CLASSES, VocDataset

__all__ = [
    "VOC_CLASSES",
    "CityscapesDataset",
    "CocoDataset",
    "Dataset",
    "DensePoseDataset",
    "LvisDataset",
    "Record",
    "SemanticDataset",
    "VocDataset",
    "get_dataset",
    "read_coco",
    "read_labels",
]

# kind -> module with NAMES, builtin(name, root) and own(name, first part, second part)
_KINDS = {
    "voc": voc,
    "coco": coco,
    "densepose": densepose,
    "lvis": lvis,
    "cityscapes": cityscapes,
    "voc_sem_seg": semantic,
    "cityscapes_sem_seg": semantic,
}
_OWN_FORMS = (
    "voc:ROOT:SPLIT, coco:ANNOTATIONS.json:IMAGE_DIR, densepose:ANNOTATIONS.json:IMAGE_DIR, "
    "lvis:ANNOTATIONS.json:IMAGE_DIR, cityscapes:ROOT:SPLIT, voc_sem_seg:ROOT:SPLIT or "
    "cityscapes_sem_seg:ROOT:SPLIT"
)


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
    lvis.refuse_other_versions(name)
    kind, _, rest = name.partition(":")
    first, _, second = rest.rpartition(":")
    if kind in _KINDS and first and second:
        return _KINDS[kind].own(name, Path(first).expanduser(), second)
    if ":" in name:
        raise UserError(f"dataset {name!r}: a data set of one's own is written {_OWN_FORMS}")
    names = [known for module in _KINDS.values() for known in module.NAMES]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise UserError(f"no dataset {name!r}: the nearest name is {nearest}; own data: {_OWN_FORMS}")
