"""Detectron2's DensePose project: found where it is installed, and told what this project has."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
from detectron2.structures import Instances
from torch import Tensor

from moco_det.common.errors import UserError
from moco_det.densepose import body
from moco_det.densepose.points import KEYS, DensePosePoints, has_points


def require() -> None:
    """Import the project, which puts its heads into Detectron2's registries.

    Raises:
        UserError: it, or a package that it needs, is not there.
    """
    try:
        import densepose  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"MODEL.DENSEPOSE_ON True needs Detectron2's DensePose project ({error}): pip install "
            "'git+https://github.com/facebookresearch/detectron2.git#subdirectory=projects/"
            "DensePose', or use --engine native"
        ) from error


def add_config(cfg: CfgNode) -> None:
    """Add all of the project's keys; see `require`."""
    require()
    from densepose import add_densepose_config

    add_densepose_config(cfg)


def build_train_loader(cfg, images: int):
    """Batches of `images` through the project's own mapper, of the images that have dense pose.

    Raises:
        UserError: the symmetries of the body, which the mapper reads in any case, are absent.
    """
    from densepose.data import DatasetMapper

    body.require([body.SYMMETRIES], "the DensePose project's mapper")
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    posed = [record for record in records if any(map(has_points, record["annotations"]))]
    if not posed:
        raise UserError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has no object with {', '.join(KEYS)}"
        )
    mapper = DatasetMapper(cfg, is_train=True)
    return build_detection_train_loader(cfg, mapper=mapper, dataset=posed, total_batch_size=images)


def surfaces(instances: Instances) -> list[Tensor]:
    """What the project's evaluator makes of its predictions: see the native `surfaces`."""
    from densepose.converters import ToChartResultConverter
    from densepose.structures import quantize_densepose_chart_result

    charts, boxes = instances.pred_densepose, instances.pred_boxes
    found = (ToChartResultConverter.convert(charts[i], boxes[i]) for i in range(len(instances)))
    return [quantize_densepose_chart_result(x).labels_uv_uint8 for x in found]


def ground_truth(points: Sequence[DensePosePoints | None], instances: Instances):
    """Of the objects of one image, with the boxes of `instances`: the project's `DensePoseList`."""
    from densepose.structures import DensePoseDataRelative, DensePoseList

    def convert(one: DensePosePoints) -> DensePoseDataRelative:
        annotation = dict(zip(KEYS, (one.x, one.y, one.charts.float(), one.u, one.v), strict=True))
        if one.parts is not None:
            annotation["dp_masks"] = one.parts.float()
        return DensePoseDataRelative(annotation)

    converted = [one if one is None else convert(one) for one in points]
    return DensePoseList(converted, instances.gt_boxes, instances.image_size)
