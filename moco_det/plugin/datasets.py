"""The data sets of `moco_det.datasets` in Detectron2's catalogs."""

from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode

from moco_det import densepose_files
from moco_det.datasets import (
    CityscapesDataset,
    CocoDataset,
    Dataset,
    DensePoseDataset,
    LvisDataset,
    SemanticDataset,
    VocDataset,
    get_dataset,
)
from moco_det.datasets.semantic import IGNORED
from moco_det.errors import UserError
from moco_det.tasks import is_semantic, num_classes, num_classes_key

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
        _REGISTER[dataset.evaluator](dataset)


def _register_coco(dataset: CocoDataset) -> None:
    register_coco_instances(dataset.name, {}, str(dataset.json_file), str(dataset.image_dir))
    metadata = MetadataCatalog.get(dataset.name)
    metadata.thing_classes = list(dataset.classes)
    if dataset.keypoint_names:
        metadata.keypoint_names = list(dataset.keypoint_names)
        metadata.keypoint_flip_map = list(dataset.keypoint_flips)


def _register_voc(dataset: VocDataset) -> None:
    """Through our own reader: Detectron2's takes .jpg files only."""
    _require_tags(dataset)
    _register(
        dataset,
        thing_classes=list(dataset.classes),
        dirname=str(dataset.root),
        split=dataset.split,
        year=2007 if dataset.eleven_point else 2012,  # which metric
        evaluator_type="pascal_voc",
    )


def _register_densepose(dataset: DensePoseDataset) -> None:
    _register(
        dataset,
        thing_classes=list(dataset.classes),
        json_file=str(dataset.json_file),
        image_root=str(dataset.image_dir),
        densepose_transform_src=str(densepose_files.file_path(densepose_files.SYMMETRIES)),
        evaluator_type="densepose",
    )


def _register_lvis(dataset: LvisDataset) -> None:
    _register(
        dataset,
        thing_classes=list(dataset.classes),
        json_file=str(dataset.json_file),
        image_root=str(dataset.image_dir),
        evaluator_type="lvis",
    )


def _register_cityscapes(dataset: CityscapesDataset) -> None:
    _register(
        dataset,
        thing_classes=list(dataset.classes),
        image_dir=str(dataset.image_dir),
        gt_dir=str(dataset.label_dir),
        evaluator_type="cityscapes_instance",
    )


def _register_semantic(dataset: SemanticDataset) -> None:
    _register(
        dataset,
        stuff_classes=list(dataset.classes),
        ignore_label=IGNORED,
        evaluator_type="sem_seg",
    )


_REGISTER = {
    "coco": _register_coco,
    "voc": _register_voc,
    "densepose": _register_densepose,
    "lvis": _register_lvis,
    "cityscapes": _register_cityscapes,
    "sem_seg": _register_semantic,
}


def _register(dataset: Dataset, **metadata: Any) -> None:
    def records() -> list[dict]:
        found = dataset.records()
        for record in found:
            for annotation in record.get("annotations", ()):
                annotation["bbox_mode"] = BoxMode.XYXY_ABS
        return found

    DatasetCatalog.register(dataset.name, records)
    MetadataCatalog.get(dataset.name).set(**metadata)


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
