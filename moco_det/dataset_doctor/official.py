"""The official data sets: where their files belong, how much is in them, and who hands them out.

The counts of images are those that the data sets' own pages and papers give; PASCAL VOC's are lines
of its split lists. `objects` counts annotations, crowds included.
"""

from dataclasses import dataclass
from pathlib import Path

from moco_det.common.errors import UserError
from moco_det.datasets import data_root, get_dataset

COCO_KINDS = ("coco", "densepose", "lvis")  # of an annotation file and an image folder
KINDS = (*COCO_KINDS, "voc", "cityscapes", "voc_sem_seg", "cityscapes_sem_seg")


@dataclass(frozen=True)
class Source:
    """`files` at `site`; `placing` says what to do with them, {root} standing for the data root."""

    site: str
    files: tuple[str, ...]
    placing: str


@dataclass(frozen=True)
class Official:
    """A built-in data set in the form of one's own: `kind`:`first`:`second`, below the data root.

    `flaws`: annotations without area that the official file is known to have. `repeats`: it is
    known to list some annotations twice.
    """

    kind: str
    first: str
    second: str
    images: int | None
    sources: tuple[Source, ...]
    objects: int | None = None
    flaws: int = 0
    repeats: bool = False


@dataclass(frozen=True)
class Place:
    """Where a data set is looked for; the parts of `moco_det.datasets`' KIND:FIRST:SECOND."""

    kind: str
    first: Path
    second: str
    official: Official | None = None


_VOC07_PLACING = "it unpacks to VOCdevkit/VOC2007; that folder belongs at {root}/VOC2007"
_VOC12_PLACING = "it unpacks to VOCdevkit/VOC2012; that folder belongs at {root}/VOC2012"
_VOC07_SITE = "PASCAL VOC 2007 (host.robots.ox.ac.uk/pascal/VOC/voc2007)"
_VOC07_TRAINVAL = Source(_VOC07_SITE, ("VOCtrainval_06-Nov-2007.tar",), _VOC07_PLACING)
_VOC07_TEST = Source(_VOC07_SITE, ("VOCtest_06-Nov-2007.tar",), _VOC07_PLACING)
_VOC12 = Source(
    "PASCAL VOC 2012 (host.robots.ox.ac.uk/pascal/VOC/voc2012)",
    ("VOCtrainval_11-May-2012.tar",),
    _VOC12_PLACING,
)
_VOC12_TEST = Source(
    "the evaluation server of PASCAL VOC 2012 (host.robots.ox.ac.uk, with an account)",
    ("VOC2012test.tar",),
    "it holds the photographs, and annotations of none of them",
)
_SBD = Source(
    "the Semantic Boundaries Dataset (Hariharan et al., ICCV 2011)",
    ("benchmark.tgz",),
    "its label matrices, as PNG, belong into {root}/VOC2012/SegmentationClassAug beside VOC's own; "
    "the list train_aug.txt, for {root}/VOC2012/ImageSets/Segmentation, is in neither of the two: "
    "moco_det/datasets/semantic.py says how it is made",
)
_COCO_ANNOTATIONS = "the annotation files belong into {root}/coco/annotations"


def _coco_images(folder: str) -> Source:
    placing = f"the folder {folder} belongs at {{root}}/coco/{folder}"
    return Source("COCO (cocodataset.org)", (f"{folder}.zip",), placing)


def _coco_annotations(year: int) -> Source:
    files = (f"annotations_trainval{year}.zip",)
    return Source("COCO (cocodataset.org)", files, _COCO_ANNOTATIONS)


_MINIVAL = Source(
    "Detectron (its page on data sets)",
    ("instances_minival2014.json", "instances_valminusminival2014.json", "and for keypoints"),
    _COCO_ANNOTATIONS,
)
_VAL_100 = Source(
    "Detectron2 (datasets/prepare_for_tests.sh)",
    ("instances_val2017_100.json", "person_keypoints_val2017_100.json"),
    _COCO_ANNOTATIONS,
)


def _lvis(split: str) -> Source:
    return Source(
        "LVIS v0.5 (lvisdataset.org; where that offers v1 only, dl.fbaipublicfiles.com/LVIS)",
        (f"lvis_v0.5_{split}.json.zip",),
        f"lvis_v0.5_{split}.json belongs into {{root}}/lvis",
    )


_CITYSCAPES = Source(
    "Cityscapes (cityscapes-dataset.com, with an account)",
    ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"),
    "the folders leftImg8bit and gtFine belong into {root}/cityscapes",
)


def _voc(folder: str, split: str, images: int, *sources: Source) -> Official:
    return Official("voc", folder, split, images, sources)


def _semantic_voc(split: str, images: int, *sources: Source) -> Official:
    return Official("voc_sem_seg", "VOC2012", split, images, (_VOC12, *sources))


def _coco(json_name: str, folder: str, images: int, *extra: Source, **counts: int) -> Official:
    sources = (_coco_images(folder), *(extra or (_coco_annotations(int(folder[-4:])),)))
    first, second = f"coco/annotations/{json_name}.json", f"coco/{folder}"
    return Official("coco", first, second, images, sources, **counts)


def _densepose(part: str, folder: str, images: int | None, site: str = "") -> Official:
    """That the minivals list annotations twice is from Detectron2's reader, which excuses them."""
    json_name = f"densepose_{part}.json"
    site = site or "dl.fbaipublicfiles.com/densepose/annotations/coco"
    annotations = Source(f"DensePose ({site})", (json_name,), _COCO_ANNOTATIONS)
    first, second = f"coco/annotations/{json_name}", f"coco/{folder}"
    sources = (_coco_images(folder), annotations)
    return Official("densepose", first, second, images, sources, repeats="minival" in part)


def _keypoints(instances: Official) -> Official:
    first = instances.first.replace("instances", "person_keypoints")
    return Official("coco", first, instances.second, instances.images, instances.sources)


_COCO = {
    "coco_2014_train": _coco("instances_train2014", "train2014", 82783),
    "coco_2014_val": _coco("instances_val2014", "val2014", 40504),
    "coco_2014_minival": _coco("instances_minival2014", "val2014", 5000, _MINIVAL),
    "coco_2014_valminusminival": _coco("instances_valminusminival2014", "val2014", 35504, _MINIVAL),
    # Two boxes have no height: cocodataset/cocoapi, issue 355.
    "coco_2017_train": _coco("instances_train2017", "train2017", 118287, objects=860001, flaws=2),
    "coco_2017_val": _coco("instances_val2017", "val2017", 5000, objects=36781),
    "coco_2017_val_100": _coco("instances_val2017_100", "val2017", 100, _VAL_100),
}
OFFICIAL = {
    "voc_2007_train": _voc("VOC2007", "train", 2501, _VOC07_TRAINVAL),
    "voc_2007_val": _voc("VOC2007", "val", 2510, _VOC07_TRAINVAL),
    "voc_2007_trainval": _voc("VOC2007", "trainval", 5011, _VOC07_TRAINVAL),
    "voc_2007_test": _voc("VOC2007", "test", 4952, _VOC07_TEST),
    "voc_2012_train": _voc("VOC2012", "train", 5717, _VOC12),
    "voc_2012_val": _voc("VOC2012", "val", 5823, _VOC12),
    "voc_2012_trainval": _voc("VOC2012", "trainval", 11540, _VOC12),
    "voc_2012_test": _voc("VOC2012", "test", 10991, _VOC12_TEST),
    **_COCO,
    **{f"keypoints_{name}": _keypoints(instances) for name, instances in _COCO.items()},
    "densepose_coco_2014_train": _densepose("train2014", "train2014", 26437),
    "densepose_coco_2014_minival": _densepose("minival2014", "val2014", 1508),
    "densepose_coco_2014_minival_100": _densepose(
        "minival2014_100", "val2014", None, "dl.fbaipublicfiles.com/detectron2/densepose"
    ),
    "densepose_coco_2014_valminusminival": _densepose("valminusminival2014", "val2014", 5984),
    "lvis_v0.5_train": Official(
        "lvis",
        "lvis/lvis_v0.5_train.json",
        "coco",
        None,
        (_lvis("train"), _coco_images("train2017")),
        objects=693958,
    ),
    "lvis_v0.5_val": Official(
        "lvis",
        "lvis/lvis_v0.5_val.json",
        "coco",
        5000,
        (_lvis("val"), _coco_images("val2017")),
    ),
    **{
        f"cityscapes_fine_{task}_{split}": Official(kind, "cityscapes", split, n, (_CITYSCAPES,))
        for task, kind in (("instance_seg", "cityscapes"), ("sem_seg", "cityscapes_sem_seg"))
        for split, n in (("train", 2975), ("val", 500))
    },
    "voc_2012_sem_seg_train": _semantic_voc("train", 1464),
    "voc_2012_sem_seg_val": _semantic_voc("val", 1449),
    "voc_2012_sem_seg_trainval": _semantic_voc("trainval", 2913),
    "voc_2012_sem_seg_train_aug": _semantic_voc("train_aug", 10582, _SBD),
}


def find_place(name: str) -> Place:
    """Where the data set of that name is looked for.

    Raises:
        UserError: there is no such name, or it is not a name of one's own data as it must be.
    """
    official, root = OFFICIAL.get(name), data_root()
    if official is not None:
        # second: a split, or an image folder below the root.
        second = official.second
        second = str(root / second) if official.kind in COCO_KINDS else second
        return Place(official.kind, root / official.first, second, official)
    kind, _, rest = name.partition(":")
    first, _, second = rest.rpartition(":")
    if kind not in KINDS or not (first and second):
        get_dataset(name)  # says what is wrong with the name, if it is wrong
        raise UserError(f"dataset {name}: its files are not known here, so they are not checked")
    return Place(kind, Path(first).expanduser(), second)


def remedy(official: Official) -> str:
    """What to download from whom, and where to put it."""
    root = data_root()
    parts = []
    for source in official.sources:
        placing = source.placing.format(root=root)
        parts.append(f"{', '.join(source.files)} from {source.site}: {placing}")
    return (
        f"download {'; '.join(parts)}. {root} is the data root; DETECTRON2_DATASETS names another"
    )
