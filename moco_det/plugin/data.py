"""The data sets of `moco_det.datasets` in Detectron2: catalogs, loaders, evaluators."""

import contextlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_train_loader,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
)
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from moco_det.common.errors import UserError
from moco_det.common.files import replacing
from moco_det.common.images import read_upright
from moco_det.config.checks import (
    annotations_of,
    check_class_count,
    is_per_pixel,
    learns_from,
)
from moco_det.datasets import (
    BUILT_IN,
    NOTHING,
    CityscapesDataset,
    CocoDataset,
    Dataset,
    DensePoseDataset,
    DepthDataset,
    Problems,
    SemanticDataset,
    VocDataset,
    Wanted,
    get_dataset,
)
from moco_det.datasets.dataset import check_images
from moco_det.datasets.semantic import IGNORED
from moco_det.datasets.sharing import PackedList, shared_list
from moco_det.datasets.voc import read_lines
from moco_det.densepose import body
from moco_det.densepose.points import KEYS, has_points
from moco_det.evaluation import evaluate, print_table
from moco_det.evaluation.coco import load_ground_truth, require_keypoints
from moco_det.evaluation.predictions import (
    prediction_record,
    predictions_file,
    save_predictions,
)
from moco_det.visualize import compared

# -- image files ----------------------------------------------------------------------------------

_detectron2_read_image = detection_utils.read_image


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Detectron2's function of this name, reading by `common.images` as the native engine does.

    Args:
        format: BGR, RGB or another of Detectron2's; in these (label maps in "L") nothing changes.

    Raises:
        UserError: it cannot be read, is cut short, or larger than INPUT.MAX_IMAGE_PIXELS.
    """
    if format not in ("BGR", "RGB"):
        return _detectron2_read_image(file_name, format)
    return detection_utils.convert_PIL_to_numpy(read_upright(file_name), format)


# Its mappers look the function up there, and take no other one.
detection_utils.read_image = read_image

# -- catalogs -------------------------------------------------------------------------------------

# Names that Detectron2 knows and `moco_det.datasets` reads all the same. Its readers of Cityscapes
# import a package that is not public, and need the polygons; its LVIS takes versions that are none
# of the paper's; its DensePose sets are for that project's own loader. So both engines train on the
# same records.
_READ_HERE = ("lvis_", "cityscapes_", "densepose_")


def is_ours(name: str) -> bool:
    """Whether `moco_det.datasets` knows the data set; others are the user's own in Detectron2."""
    return name in BUILT_IN or ":" in name


def register_datasets(names: Iterable[str], wanted: Wanted | None = None) -> None:
    """Register those of `names` that Detectron2 does not know, or does not read as they should be.

    Args:
        wanted: what every object that is trained on must have, on images that are looked for;
            None: nothing, and the images are not.

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
        register(dataset, wanted)


def register(dataset: Dataset, wanted: Wanted | None = None) -> None:
    """Put the records of `dataset`, and what Detectron2's evaluators ask of it, in the catalogs.

    Raises:
        UserError: an annotation that Detectron2's evaluator cannot read.
    """
    if isinstance(dataset, VocDataset):
        _require_tags(dataset)
    DatasetCatalog.register(dataset.name, lambda: _records(dataset, wanted))
    MetadataCatalog.get(dataset.name).set(**_metadata(dataset))


def _records(dataset: Dataset, wanted: Wanted | None) -> list[dict]:
    records = dataset.records(wanted=wanted or NOTHING)
    if wanted is not None:
        check_images(records, Problems())
    for record in records:
        for annotation in record.get("annotations", ()):
            annotation["bbox_mode"] = BoxMode.XYXY_ABS
    return records


def shared_records(cfg, keep: Callable[[dict], bool] = bool) -> PackedList:
    """Detectron2's training records, read by one process of each machine. Collective.

    It warns, prints and leaves out as its own loader does.

    Args:
        keep: the records to train on.
    """

    def read() -> PackedList:
        keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
        found = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=proposals,
        )
        return PackedList.of(filter(keep, found))

    return shared_list(read)


def _metadata(dataset: Dataset) -> dict[str, Any]:
    """Of one data set, as Detectron2's evaluators of its kind call it."""
    names = {"thing_classes": list(dataset.classes)}
    match dataset:
        case SemanticDataset():
            found = {"stuff_classes": list(dataset.classes), "ignore_label": IGNORED}
            return found | {"evaluator_type": "sem_seg"}
        case DepthDataset():
            return {"evaluator_type": "depth"}
        case VocDataset():
            year = 2007 if dataset.eleven_point else 2012  # which metric
            found = {"dirname": str(dataset.root), "split": dataset.split, "year": year}
            return names | found | {"evaluator_type": "pascal_voc"}
        case CityscapesDataset():
            found = {"image_dir": str(dataset.image_dir), "gt_dir": str(dataset.label_dir)}
            return names | found | {"evaluator_type": "cityscapes_instance"}
        case CocoDataset():
            found = {"json_file": str(dataset.json_file), "image_root": str(dataset.image_dir)}
            if isinstance(dataset, DensePoseDataset):
                found["densepose_transform_src"] = str(body.file_path(body.SYMMETRIES))
            if type(dataset) is CocoDataset:
                numbers = enumerate(dataset.category_ids)
                found["thing_dataset_id_to_contiguous_id"] = {i: place for place, i in numbers}
            if dataset.keypoint_names:
                found["keypoint_names"] = list(dataset.keypoint_names)
                found["keypoint_flip_map"] = list(dataset.keypoint_flips)
            return names | found | {"evaluator_type": dataset.evaluator}
    raise TypeError(f"{type(dataset).__name__} is no kind of data set")


def _require_tags(dataset: VocDataset) -> None:
    """UserError where Detectron2's evaluator would stumble over an annotation."""
    for path in sorted(dataset.annotation_dir.glob("[!.]*.xml")):
        for node in _objects(path):
            for tag in ("pose", "truncated", "difficult"):
                if node.find(tag) is None:
                    raise UserError(
                        f"{path}: an <object> without <{tag}>, which Detectron2's VOC evaluator "
                        "reads: add it, or use --engine native"
                    )


def _objects(path: Path) -> list[ElementTree.Element]:
    """Of an annotation, as Detectron2's VOC evaluator reads it."""
    try:
        return ElementTree.parse(path).findall("object")
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise UserError(
            f"cannot read annotation {path}: {error}; Detectron2's VOC evaluator reads XML in "
            "UTF-8: convert it, or use --engine native"
        ) from error


def check_voc_scoring(name: str) -> None:
    """UserError where Detectron2's evaluator cannot read what a test set of VOC's layout has.

    It wants an id and nothing else in a line of the list, and whole numbers in the annotations.
    """
    dataset = get_dataset(name) if name.startswith("voc:") else None
    if dataset is None:
        return
    numbers = ["truncated", "difficult", *(f"bndbox/{k}" for k in ("xmin", "ymin", "xmax", "ymax"))]
    for line in read_lines(dataset.split_file):
        if len(line.split()) != 1:
            raise UserError(
                f"{dataset.split_file} has the line {line[:40]!r}, where Detectron2's VOC "
                "evaluator reads an id and nothing else: correct it, or use --engine native"
            )
        path = dataset.annotation_dir / f"{line.strip()}.xml"
        for node, tag in ((node, tag) for node in _objects(path) for tag in numbers):
            text = (node.findtext(tag) or "").strip()
            if not text.removeprefix("-").isdecimal():
                raise UserError(
                    f"{path}: <{tag}> is {text[:40]!r}, which Detectron2's VOC evaluator reads as "
                    "a whole number: correct it, or use --engine native"
                )


def check_classes(cfg) -> None:
    """UserError unless every data set has what the model learns, and as many classes as it."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        if annotations_of(metadata.get("evaluator_type", "")) != learns_from(cfg):
            raise UserError(
                f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} and dataset {name} do not "
                "fit: SemanticSegmentor learns from label maps, DepthEstimator from depth maps, "
                "all others from objects"
            )
        classes = metadata.get("stuff_classes" if is_per_pixel(cfg) else "thing_classes")
        if classes:
            check_class_count(cfg, name, classes)


# -- dense pose -----------------------------------------------------------------------------------


def build_dense_pose_loader(cfg, images: int):
    """Batches of `images` through the DensePose project's own mapper, of those with dense pose.

    Raises:
        UserError: the symmetries of the body, which the mapper reads in any case, are absent.
    """
    from densepose.data import DatasetMapper as DensePoseMapper

    body.require([body.SYMMETRIES], "the DensePose project's mapper")
    posed = shared_records(cfg, lambda record: any(map(has_points, record["annotations"])))
    if not posed:
        raise UserError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has no object with {', '.join(KEYS)}"
        )
    mapper = DensePoseMapper(cfg, is_train=True)
    return build_detection_train_loader(cfg, mapper=mapper, dataset=posed, total_batch_size=images)


def surfaces(instances: Instances) -> list[Tensor]:
    """As the DensePose project's evaluator has its predictions: see the native `surfaces`."""
    from densepose.converters import ToChartResultConverter
    from densepose.structures import quantize_densepose_chart_result

    charts, boxes = instances.pred_densepose, instances.pred_boxes
    found = (ToChartResultConverter.convert(charts[i], boxes[i]) for i in range(len(instances)))
    return [quantize_densepose_chart_result(x).labels_uv_uint8 for x in found]


# -- evaluation -----------------------------------------------------------------------------------

# Detectron2's evaluators of these do not run: LVIS's ends in the np.float that NumPy no longer has,
# Cityscapes' imports a package that is not public; of label maps, Detectron2 reads trainIds only;
# DensePose's takes its body model from the net alone; of depth it has none.
# So `moco_det.evaluation` scores them, for both engines, with the same official tools.
_SCORED_HERE = ("lvis", "cityscapes_instance", "sem_seg", "depth", "densepose")


def build_evaluator(cfg, dataset_name: str) -> DatasetEvaluators:
    """The metric of the data set, and the predictions saved as the native engine saves them.

    Raises:
        UserError: a kind of data set that has no metric here.
    """
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    records = PredictionRecords(cfg.OUTPUT_DIR, dataset_name, scored=kind in _SCORED_HERE)
    if kind in _SCORED_HERE:
        return DatasetEvaluators([records])
    if kind == "pascal_voc":
        official = PascalVOCDetectionEvaluator(dataset_name)
    elif kind == "coco":
        if is_ours(dataset_name):
            _complete_ground_truth(cfg, get_dataset(dataset_name))
        official = COCOEvaluator(
            dataset_name,
            output_dir=f"{cfg.OUTPUT_DIR}/inference",
            kpt_oks_sigmas=list(cfg.TEST.KEYPOINT_OKS_SIGMAS),
        )
    else:
        raise UserError(f"data set {dataset_name}: no evaluator for the kind {kind!r}")
    # The records first: on a CPU, COCOEvaluator moves the keypoints by half a pixel where they lie.
    return DatasetEvaluators([records, official])


def _complete_ground_truth(cfg, dataset: CocoDataset) -> None:
    """Let Detectron2 score by a copy of the annotation file, as the native engine's tool has it.

    It has what users' own files lack (an area, iscrowd, sizes), and annotation ids from 1 on.
    """
    path = predictions_file(cfg.OUTPUT_DIR, dataset.name)
    path = path.with_name(f"ground_truth_{path.name}")
    if comm.is_main_process():
        content = dataset.content()
        if cfg.MODEL.KEYPOINT_ON:
            require_keypoints(content, dataset)
        with contextlib.redirect_stdout(io.StringIO()):
            truth = load_ground_truth(dataset, content).dataset
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:  # the runs of masks are bytes
            temporary.write_text(json.dumps(truth, default=lambda code: code.decode("ascii")))
    comm.synchronize()
    fields = MetadataCatalog.pop(dataset.name).as_dict() | {"json_file": str(path)}
    del fields["name"]
    MetadataCatalog.get(dataset.name).set(**fields)


@dataclass
class PredictionRecords(DatasetEvaluator):
    """Saves the predictions in the form in which the native engine does.

    Args:
        output_dir: they go to its folder `inference`.
        dataset_name: of `moco_det.datasets`, where they are scored.
        scored: also return the metrics of `moco_det.evaluation`.
    """

    output_dir: str
    dataset_name: str
    scored: bool = False
    records: list[dict] = field(default_factory=list, init=False)

    def reset(self) -> None:
        self.records = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for item, output in zip(inputs, outputs, strict=True):
            if "instances" in output:
                output = fields_of(output["instances"])
            self.records.append(prediction_record(item["image_id"], output))

    def evaluate(self) -> dict | None:
        """The metrics, where `scored`, on the main process; None otherwise."""
        shares = comm.gather(self.records)
        if not comm.is_main_process():
            return None
        records = sum(shares, [])
        save_predictions(self.output_dir, self.dataset_name, records)
        self.show(records)
        if not self.scored:
            return None
        results = evaluate(get_dataset(self.dataset_name), records)
        print_table(results)
        return results

    def show(self, records: list[dict]) -> None:
        """Some of them beside what is annotated, to TensorBoard by Detectron2's event storage,
        which there is in the course of a training."""
        if has_event_storage() and is_ours(self.dataset_name):
            for name, picture in compared(get_dataset(self.dataset_name), records):
                get_event_storage().put_image(f"predictions/{name}", picture)


def fields_of(instances) -> dict:
    """Detectron2's Instances as the native model's output; see `prediction_record`."""
    output = {
        "boxes": instances.pred_boxes.tensor,
        "scores": instances.scores,
        "classes": instances.pred_classes,
    }
    for name in ("masks", "keypoints"):
        if instances.has(f"pred_{name}"):
            output[name] = instances.get(f"pred_{name}")
    if instances.has("pred_densepose"):
        output["densepose"] = surfaces(instances)
    return output
