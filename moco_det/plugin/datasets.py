"""Data sets of one's own, as `moco_det.datasets` names them, in Detectron2's catalogs."""

from collections.abc import Iterable
from xml.etree import ElementTree

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode

from moco_det.datasets import CocoDataset, VocDataset, get_dataset
from moco_det.errors import UserError


def register_datasets(names: Iterable[str]) -> None:
    """Register those of `names` that Detectron2 does not know yet: voc:... and coco:...

    Raises:
        UserError: an unknown name; a missing file or folder.
    """
    for name in names:
        if name in DatasetCatalog:
            continue
        dataset = get_dataset(name)
        if isinstance(dataset, CocoDataset):
            register_coco_instances(name, {}, str(dataset.json_file), str(dataset.image_dir))
            MetadataCatalog.get(name).set(thing_classes=list(dataset.classes))
        else:
            _register_voc(dataset)


def _register_voc(dataset: VocDataset) -> None:
    """Through our own reader: Detectron2's takes .jpg files only."""

    def records() -> list[dict]:
        found = dataset.records()
        for record in found:
            for annotation in record["annotations"]:
                annotation["bbox_mode"] = BoxMode.XYXY_ABS
        return found

    _require_tags(dataset)
    DatasetCatalog.register(dataset.name, records)
    MetadataCatalog.get(dataset.name).set(
        thing_classes=list(dataset.classes),
        dirname=str(dataset.root),
        split=dataset.split,
        year=2007 if dataset.eleven_point else 2012,  # which metric
        evaluator_type="pascal_voc",
    )


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
    """UserError unless every data set has as many classes as the model."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes and len(classes) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            raise UserError(
                f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, but {name} has "
                f"{len(classes)} classes ({', '.join(classes[:20])}): set it to {len(classes)}"
            )
