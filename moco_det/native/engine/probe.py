"""The native engine's detector, opened up: see `moco_det.parity.probe`."""

from collections.abc import Sequence

from torch import Tensor

from moco_det.config.loading import load_config, on_available_device
from moco_det.native.engine.solver import build_optimizer
from moco_det.native.modeling.meta_arch import build_model
from moco_det.parity.probe import EngineProbe, Quantities, of_surfaces, recording


class Probe(EngineProbe):
    """The model of a YAML, on its MODEL.DEVICE or else the CPU, at its random initialisation."""

    def __init__(self, config_file: str, opts: Sequence[str] = ()):
        cfg = on_available_device(load_config(config_file, opts))
        model = build_model(cfg)
        super().__init__(model, build_optimizer(cfg, model))

    def inputs(self, items: list[dict]) -> list[dict]:
        return items

    def losses(self, items: list[dict]) -> dict[str, Tensor]:
        return self.model(items)

    def outputs(self, items: list[dict]) -> Quantities:
        model = self.model
        images, sizes = model.preprocess(items)
        features = model.backbone(images)
        found = {f"features {name}": [feature] for name, feature in features.items()}
        if hasattr(model, "sem_seg_head"):
            found["pixel logits"] = [model.sem_seg_head(features)]
            return found | {"pixel scores": [x["sem_seg"] for x in model(items)]}
        rpn = model.proposal_generator
        logits, deltas = rpn.rpn_head([features[name] for name in rpn.in_features])
        for name, logit, delta in zip(rpn.in_features, logits, deltas, strict=True):
            found[f"RPN logits on {name}"] = [logit]
            found[f"RPN deltas on {name}"] = [delta]
        boxes, scores = rpn.propose(*rpn.predict(features), sizes)
        found |= {"proposal boxes": boxes, "proposal scores": scores}
        return found | self._detections(items)

    def _detections(self, items: list[dict]) -> Quantities:
        heads = self.model.roi_heads
        with recording(heads) as results, recording(heads.keypoint_head) as maps:
            detections = self.model(items)
        keys = ("boxes", "scores", "classes")
        found = {f"detection {key}": [x[key] for x in detections] for key in keys}
        ((in_boxes, _),) = results
        if heads.mask_head is not None:
            found["mask probabilities"] = [x["mask_probabilities"] for x in in_boxes]
            found["detection masks"] = [x["masks"] for x in detections]
        if heads.keypoint_head is not None:
            (heatmaps,) = maps
            found["keypoint heatmaps"] = heatmaps.split([len(x["boxes"]) for x in in_boxes])
            found["detection keypoints"] = [x["keypoints"][..., :2] for x in detections]
            found["keypoint scores"] = [x["keypoints"][..., 2] for x in detections]
        if "charts" in in_boxes[0]:
            for name in ("coarse", "fine", "u", "v"):
                found[f"charts {name}"] = [getattr(x["charts"], name) for x in in_boxes]
            found |= of_surfaces([x["densepose"] for x in detections])
        return found
