"""Detectron2's detector, opened up: see `moco_det.parity.probe`."""

from collections.abc import Sequence
from typing import Any

from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor

from moco_det.densepose.points import KEYS, DensePosePoints
from moco_det.native.modeling.densepose_head import Charts
from moco_det.parity.probe import EngineProbe
from moco_det.plugin import load_config
from moco_det.plugin.data import fields_of
from moco_det.plugin.extensions import build_optimizer


class Probe(EngineProbe):
    """The model of a YAML, on its MODEL.DEVICE or else the CPU, at its random initialisation."""

    def __init__(self, config_file: str, opts: Sequence[str] = ()):
        cfg = load_config(config_file, opts)
        model = build_model(cfg)
        if hasattr(model, "proposal_generator"):
            model.proposal_generator.rpn_head.register_forward_hook(in_float32)
        super().__init__(model, build_optimizer(cfg, model))

    def inputs(self, items: list[dict]) -> list[dict]:
        return [detectron2_input(item) for item in items]

    def losses(self, items: list[dict]) -> dict[str, Tensor]:
        with EventStorage():  # Detectron2's losses log themselves
            return self.model(self.inputs(items))

    def proposals(self, items: list[dict], stages: dict[str, Any]) -> tuple[list, list]:
        found, _ = stages["proposal_generator"]
        return [x.proposal_boxes.tensor for x in found], [x.objectness_logits for x in found]

    def detections(self, results: list, stages: dict[str, Any]) -> tuple[list[dict], list[dict]]:
        in_boxes, _ = stages["roi_heads"]
        return [fields_of(x["instances"]) for x in results], [fields_in_boxes(x) for x in in_boxes]


def fields_in_boxes(instances: Instances) -> dict:
    """What the heads found for an image, before it is put on the image."""
    found = {}
    if instances.has("pred_masks"):
        found["mask_probabilities"] = instances.pred_masks[:, 0]
    if instances.has("pred_keypoint_heatmaps"):
        found["keypoint_heatmaps"] = instances.pred_keypoint_heatmaps
    if instances.has("pred_densepose"):
        charts = instances.pred_densepose
        found["charts"] = Charts(charts.coarse_segm, charts.fine_segm, charts.u, charts.v)
    return found


def detectron2_input(item: dict) -> dict:
    """What the native engine trains on -> what Detectron2 does."""
    if "sem_seg" in item or "depth" in item:
        return item
    size = tuple(item["image"].shape[1:])
    instances = Instances(size, gt_boxes=Boxes(item["gt_boxes"]), gt_classes=item["gt_classes"])
    if "gt_masks" in item:
        masks = item["gt_masks"]
        instances.gt_masks = (BitMasks if isinstance(masks, Tensor) else PolygonMasks)(masks)
    if "gt_keypoints" in item:
        instances.gt_keypoints = Keypoints(item["gt_keypoints"])
    if any(points is not None for points in item.get("gt_densepose", ())):
        instances.gt_densepose = ground_truth(item["gt_densepose"], instances)
    return {key: item[key] for key in ("image", "height", "width")} | {"instances": instances}


def ground_truth(points: Sequence[DensePosePoints | None], instances: Instances):
    """Of the objects of one image, with the boxes of `instances`: `DensePoseList`."""
    from densepose.structures import DensePoseDataRelative, DensePoseList

    def convert(one: DensePosePoints) -> DensePoseDataRelative:
        annotation = dict(zip(KEYS, (one.x, one.y, one.charts.float(), one.u, one.v), strict=True))
        if one.parts is not None:
            annotation["dp_masks"] = one.parts.float()
        return DensePoseDataRelative(annotation)

    converted = [one if one is None else convert(one) for one in points]
    return DensePoseList(converted, instances.gt_boxes, instances.image_size)


def in_float32(head, inputs, outputs: tuple[list[Tensor], list[Tensor]]):
    """NMS takes scores of the boxes' type; this changes nothing but in a float64 network."""
    return tuple([x.float() for x in level_outputs] for level_outputs in outputs)
