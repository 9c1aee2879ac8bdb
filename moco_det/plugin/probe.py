"""Detectron2's detector, opened up: see `moco_det.parity.probe`."""

from collections.abc import Sequence

from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor

from moco_det.parity.probe import EngineProbe, Quantities, of_surfaces, recording
from moco_det.plugin import dense_pose, load_config

# Fields of the dense pose predictor: ours -> Detectron2's.
CHARTS = {"coarse": "coarse_segm", "fine": "fine_segm", "u": "u", "v": "v"}


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

    def outputs(self, items: list[dict]) -> Quantities:
        model, batch = self.model, self.inputs(items)
        if hasattr(model, "sem_seg_head"):
            with recording(model.backbone) as features, recording(model.sem_seg_head) as logits:
                scores = [x["sem_seg"] for x in model(batch)]
            found = {f"features {name}": [feature] for name, feature in features[0].items()}
            return found | {"pixel logits": [logits[0][0]], "pixel scores": scores}
        rpn = model.proposal_generator
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        found = {f"features {name}": [feature] for name, feature in features.items()}
        logits, deltas = rpn.rpn_head([features[name] for name in rpn.in_features])
        for name, logit, delta in zip(rpn.in_features, logits, deltas, strict=True):
            found[f"RPN logits on {name}"] = [logit]
            found[f"RPN deltas on {name}"] = [delta]
        proposals, _ = rpn(images, features, None)
        found["proposal boxes"] = [x.proposal_boxes.tensor for x in proposals]
        found["proposal scores"] = [x.objectness_logits for x in proposals]
        return found | self._detections(batch)

    def _detections(self, batch: list[dict]) -> Quantities:
        with recording(self.model.roi_heads) as results:
            detections = [x["instances"] for x in self.model(batch)]
        ((in_boxes, _),) = results
        found = {
            "detection boxes": [x.pred_boxes.tensor for x in detections],
            "detection scores": [x.scores for x in detections],
            "detection classes": [x.pred_classes for x in detections],
        }
        if detections[0].has("pred_masks"):
            found["mask probabilities"] = [x.pred_masks[:, 0] for x in in_boxes]
            found["detection masks"] = [x.pred_masks for x in detections]
        if detections[0].has("pred_keypoints"):
            found["keypoint heatmaps"] = [x.pred_keypoint_heatmaps for x in in_boxes]
            found["detection keypoints"] = [x.pred_keypoints[..., :2] for x in detections]
            found["keypoint scores"] = [x.pred_keypoints[..., 2] for x in detections]
        if detections[0].has("pred_densepose"):
            for ours, theirs in CHARTS.items():
                found[f"charts {ours}"] = [getattr(x.pred_densepose, theirs) for x in in_boxes]
            found |= of_surfaces([dense_pose.surfaces(x) for x in detections])
        return found


def detectron2_input(item: dict) -> dict:
    """What the native engine trains on -> what Detectron2 does."""
    if "sem_seg" in item:
        return item
    size = tuple(item["image"].shape[1:])
    instances = Instances(size, gt_boxes=Boxes(item["gt_boxes"]), gt_classes=item["gt_classes"])
    if "gt_masks" in item:
        masks = item["gt_masks"]
        instances.gt_masks = (BitMasks if isinstance(masks, Tensor) else PolygonMasks)(masks)
    if "gt_keypoints" in item:
        instances.gt_keypoints = Keypoints(item["gt_keypoints"])
    if any(points is not None for points in item.get("gt_densepose", ())):
        instances.gt_densepose = dense_pose.ground_truth(item["gt_densepose"], instances)
    return {key: item[key] for key in ("image", "height", "width")} | {"instances": instances}


def in_float32(head, inputs, outputs: tuple[list[Tensor], list[Tensor]]):
    """NMS takes scores of the boxes' type; this changes nothing but in a float64 network."""
    return tuple([x.float() for x in level_outputs] for level_outputs in outputs)
