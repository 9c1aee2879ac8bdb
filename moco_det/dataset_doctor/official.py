"""The official data sets: how much is in them, who hands them out, and where their files belong.

The counts of images are those that the data sets' own pages and papers give; PASCAL VOC's are lines
of its split lists. `objects` counts annotations, crowds included.
"""

from dataclasses import dataclass

from moco_det.datasets import data_root


@dataclass(frozen=True)
class Source:
    """`files` at `site`; `placing` says what to do with them, {root} standing for the data root."""

    site: str
    files: tuple[str, ...]
    placing: str


@dataclass(frozen=True)
class Official:
    """What a built-in data set holds.

    `images` is None where no number is published. `flaws`: annotations without area that the
    official file is known to have. `repeats`: it is known to list some annotations twice.
    """

    images: int | None
    sources: tuple[Source, ...]
    objects: int | None = None
    flaws: int = 0
    repeats: bool = False


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
    "it holds the images, and annotations of none of them",
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


def _coco(folder: str, images: int, annotations: Source | None = None, **counts: int) -> Official:
    annotations = annotations or _coco_annotations(int(folder[-4:]))
    return Official(images, (_coco_images(folder), annotations), **counts)


def _densepose(part: str, folder: str, images: int | None, site: str = "") -> Official:
    """That the minivals list annotations twice is from Detectron2's reader, which excuses them."""
    site = site or "dl.fbaipublicfiles.com/densepose/annotations/coco"
    annotations = Source(f"DensePose ({site})", (f"densepose_{part}.json",), _COCO_ANNOTATIONS)
    return Official(images, (_coco_images(folder), annotations), repeats="minival" in part)


_COCO = {
    "coco_2014_train": _coco("train2014", 82783),
    "coco_2014_val": _coco("val2014", 40504),
    "coco_2014_minival": _coco("val2014", 5000, _MINIVAL),
    "coco_2014_valminusminival": _coco("val2014", 35504, _MINIVAL),
    # Two boxes have no height: cocodataset/cocoapi, issue 355.
    "coco_2017_train": _coco("train2017", 118287, objects=860001, flaws=2),
    "coco_2017_val": _coco("val2017", 5000, objects=36781),
    "coco_2017_val_100": _coco("val2017", 100, _VAL_100),
}
OFFICIAL = {
    "voc_2007_train": Official(2501, (_VOC07_TRAINVAL,)),
    "voc_2007_val": Official(2510, (_VOC07_TRAINVAL,)),
    "voc_2007_trainval": Official(5011, (_VOC07_TRAINVAL,)),
    "voc_2007_test": Official(4952, (_VOC07_TEST,)),
    "voc_2012_train": Official(5717, (_VOC12,)),
    "voc_2012_val": Official(5823, (_VOC12,)),
    "voc_2012_trainval": Official(11540, (_VOC12,)),
    "voc_2012_test": Official(10991, (_VOC12_TEST,)),
    **_COCO,
    **{f"keypoints_{name}": Official(of.images, of.sources) for name, of in _COCO.items()},
    "densepose_coco_2014_train": _densepose("train2014", "train2014", 26437),
    "densepose_coco_2014_minival": _densepose("minival2014", "val2014", 1508),
    "densepose_coco_2014_minival_100": _densepose(
        "minival2014_100", "val2014", None, "dl.fbaipublicfiles.com/detectron2/densepose"
    ),
    "densepose_coco_2014_valminusminival": _densepose("valminusminival2014", "val2014", 5984),
    "lvis_v0.5_train": Official(None, (_lvis("train"), _coco_images("train2017")), objects=693958),
    "lvis_v0.5_val": Official(5000, (_lvis("val"), _coco_images("val2017"))),
    **{
        f"cityscapes_fine_{task}_{split}": Official(images, (_CITYSCAPES,))
        for task in ("instance_seg", "sem_seg")
        for split, images in (("train", 2975), ("val", 500))
    },
    "voc_2012_sem_seg_train": Official(1464, (_VOC12,)),
    "voc_2012_sem_seg_val": Official(1449, (_VOC12,)),
    "voc_2012_sem_seg_trainval": Official(2913, (_VOC12,)),
    "voc_2012_sem_seg_train_aug": Official(10582, (_VOC12, _SBD)),
}


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
