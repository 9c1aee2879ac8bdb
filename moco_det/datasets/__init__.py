"""Data sets by name, as lists of Detectron2's standard records.

What reads annotations belongs here, one module for each family of formats; what scores predictions
does not (`moco_det.evaluation`), nor what turns records into a model's input
(`moco_det.native.data`). Start with `get_dataset` below and `dataset.py`, which says what a data
set is; `built_in.yaml` lists those that have a name.

Names of Detectron2, below $DETECTRON2_DATASETS (default `datasets/`), in its layout:
    voc_2007_trainval          VOC2007/{JPEGImages,Annotations,ImageSets/Main/trainval.txt}
    coco_2017_train            coco/annotations/instances_train2017.json, coco/train2017/
    keypoints_coco_2017_train  coco/annotations/person_keypoints_train2017.json, coco/train2017/
    densepose_coco_2014_train  coco/annotations/densepose_train2014.json, coco/train2014/
    lvis_v0.5_train            lvis/lvis_v0.5_train.json, coco/train2017/
    cityscapes_fine_instance_seg_train
                               cityscapes/{leftImg8bit,gtFine}/train/, see `datasets.cityscapes`
A folder of your own, named in the YAML or on the command line, without registration:
    voc:ROOT:SPLIT             ROOT/{JPEGImages,Annotations,ImageSets/Main/SPLIT.txt}
    coco:ANNOTATIONS.json:IMAGE_DIR
    densepose:ANNOTATIONS.json:IMAGE_DIR
    lvis:ANNOTATIONS.json:IMAGE_DIR
    cityscapes:ROOT:SPLIT      ROOT/{leftImg8bit,gtFine}/SPLIT/
    voc_sem_seg:ROOT:SPLIT, cityscapes_sem_seg:ROOT:SPLIT: see `moco_det.datasets.semantic`, which
    also says where voc_2012_sem_seg_SPLIT and cityscapes_fine_sem_seg_SPLIT are looked for
    nyud_sem_seg:ROOT:SPLIT, nyud_depth:ROOT:SPLIT: see `moco_det.datasets.nyud`, which also says
    where nyud_v2_sem_seg_SPLIT and nyud_v2_depth_SPLIT are looked for
"""

import contextlib
import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moco_det.common.errors import UserError
from moco_det.common.processes import world_size
from moco_det.datasets.cityscapes import CityscapesDataset
from moco_det.datasets.coco import (
    CocoDataset,
    DensePoseDataset,
    LvisDataset,
    known_categories,
    refuse_other_versions,
    remember_categories,
)
from moco_det.datasets.dataset import BUILT_IN, NOTHING, BuiltIn, Dataset, Record, Wanted
from moco_det.datasets.depth import DepthDataset, read_depth
from moco_det.datasets.nyud import DepthNyudDataset, SemanticNyudDataset
from moco_det.datasets.problems import Problem, Problems, shown
from moco_det.datasets.semantic import (
    MappedDataset,
    SemanticCityscapesDataset,
    SemanticDataset,
    SemanticVocDataset,
    read_labels,
)
from moco_det.datasets.sharing import PackedList, shared_list
from moco_det.datasets.voc import VOC_CLASSES, VocDataset

__all__ = [
    "BUILT_IN",
    "KINDS",
    "NOTHING",
    "VOC_CLASSES",
    "BuiltIn",
    "CityscapesDataset",
    "CocoDataset",
    "Dataset",
    "DensePoseDataset",
    "DepthDataset",
    "DepthNyudDataset",
    "Location",
    "LvisDataset",
    "MappedDataset",
    "Problem",
    "Problems",
    "Record",
    "SemanticCityscapesDataset",
    "SemanticDataset",
    "SemanticNyudDataset",
    "SemanticVocDataset",
    "VocDataset",
    "Wanted",
    "data_root",
    "get_dataset",
    "locate",
    "read_categories_together",
    "read_depth",
    "read_labels",
]

KINDS: dict[str, type[Dataset]] = {
    "voc": VocDataset,
    "coco": CocoDataset,
    "densepose": DensePoseDataset,
    "lvis": LvisDataset,
    "cityscapes": CityscapesDataset,
    "voc_sem_seg": SemanticVocDataset,
    "cityscapes_sem_seg": SemanticCityscapesDataset,
    "nyud_sem_seg": SemanticNyudDataset,
    "nyud_depth": DepthNyudDataset,
}


@dataclass(frozen=True)
class Location:
    """Where a data set is looked for: the parts of KIND:FIRST:SECOND.

    `data_root`: that of a built-in data set; None for one of the user's own.
    """

    kind: str
    first: Path
    second: str
    data_root: Path | None = None


def data_root() -> Path:
    """The folder that holds the data sets with built-in names."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def get_dataset(name: str, problems: Problems | None = None) -> Dataset:
    """The data set of that name; see the head of this module for the names.

    Args:
        problems: told what is wrong with its classes; None: the first is raised.

    Raises:
        UserError: an unknown name; a missing file or folder.
    """
    found = locate(name)
    return KINDS[found.kind].open(name, found.first, found.second, found.data_root, problems)


def read_categories_together(names: Iterable[str]) -> None:
    """Let the first process of each machine read what `get_dataset` needs of COCO's files, which
    takes a large one's whole length, and the others hear of it. Collective.

    A process that cannot use the files itself says so when it opens them.
    """
    if world_size() == 1:
        return

    def read() -> PackedList:
        for name in names:
            with contextlib.suppress(UserError):
                get_dataset(name)
        return PackedList.of(known_categories().items())

    remember_categories(dict(shared_list(read)))


def locate(name: str) -> Location:
    """Where the data set of that name is looked for.

    Raises:
        UserError: an unknown name.
    """
    refuse_other_versions(name)
    built_in = BUILT_IN.get(name)
    kind, _, parts = (built_in.location if built_in else name).partition(":")
    first, _, second = parts.rpartition(":")
    if built_in:
        root = data_root()
        if KINDS[kind].form.endswith(":IMAGE_DIR"):
            second = str(root / second)
        return Location(kind, root / first, second, root)
    if kind in KINDS and first and second:
        return Location(kind, Path(first).expanduser(), second)
    forms = _own_forms()
    if ":" in name:
        raise UserError(f"dataset {shown(name, 34)}: a data set of one's own is written {forms}")
    nearest = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.0)[0]
    asked = shown(name, 34)
    raise UserError(f"no dataset {asked}: the nearest name is {nearest}; own data: {forms}")


def _own_forms() -> str:
    """How a data set of one's own is written: every form, with the kinds that have it."""
    kinds: dict[str, list[str]] = {}
    for kind, dataset in KINDS.items():
        kinds.setdefault(dataset.form, []).append(kind)
    parts = []
    for form, (first, *others) in kinds.items():
        alike = f" (likewise {', '.join(others)})" if others else ""
        parts.append(f"{first}:{form}{alike}")
    return " or ".join(parts)
