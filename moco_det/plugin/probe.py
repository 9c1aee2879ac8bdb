"""Detectron2's detector, opened up: see `moco_det.probe`."""

from collections.abc import Sequence

from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from moco_det.plugin import load_config
from moco_det.probe import EngineProbe, Quantities


class Probe(EngineProbe):
    """The model of a YAML, on its MODEL.DEVICE or else the CPU, at its random initialisation."""

    def __init__(self, config_file: str, opts: Sequence[str] = ()):
        cfg = load_config(config_file, opts)
        model = build_model(cfg)
        model.proposal_generator.rpn_head.register_forward_hook(in_float32)
        super().__init__(model, build_optimizer(cfg, model))

    def inputs(self, items: list[dict]) -> list[dict]:
        return [
            {
                "image": item["image"],
                "height": item["height"],
                "width": item["width"],
                "instances": Instances(
                    tuple(item["image"].shape[1:]),
                    gt_boxes=Boxes(item["gt_boxes"]),
                    gt_classes=item["gt_classes"],
                ),
            }
            for item in items
        ]

    def losses(self, items: list[dict]) -> dict[str, Tensor]:
        with EventStorage():  # Detectron2's losses log themselves
            return self.model(self.inputs(items))

    def outputs(self, items: list[dict]) -> Quantities:
        model, rpn, batch = self.model, self.model.proposal_generator, self.inputs(items)
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
        detections = [x["instances"] for x in model(batch)]
        found["detection boxes"] = [x.pred_boxes.tensor for x in detections]
        found["detection scores"] = [x.scores for x in detections]
        found["detection classes"] = [x.pred_classes for x in detections]
        return found


def in_float32(head, inputs, outputs: tuple[list[Tensor], list[Tensor]]):
    """NMS takes scores of the boxes' type; this changes nothing but in a float64 network."""
    return tuple([x.float() for x in level_outputs] for level_outputs in outputs)
