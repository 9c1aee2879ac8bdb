"""The native engine's detector, opened up: see `moco_det.parity.probe`."""

from collections.abc import Sequence
from typing import Any

from moco_det.config.loading import load_config, on_available_device
from moco_det.native.engine.solver import build_optimizer
from moco_det.native.modeling.meta_arch import build_model
from moco_det.parity.probe import EngineProbe


class Probe(EngineProbe):
    """The model of a YAML, on its MODEL.DEVICE or else the CPU, at its random initialisation."""

    def __init__(self, config_file: str, opts: Sequence[str] = ()):
        cfg = on_available_device(load_config(config_file, opts))
        model = build_model(cfg)
        super().__init__(model, build_optimizer(cfg, model))

    def proposals(self, items: list[dict], stages: dict[str, Any]) -> tuple[list, list]:
        # Once more, as the RPN returns no scores.
        rpn = self.model.proposal_generator
        _, sizes = self.model.preprocess(items)
        return rpn.propose(*rpn.predict(stages["backbone"]), sizes)

    def detections(self, results: list, stages: dict[str, Any]) -> tuple[list[dict], list[dict]]:
        in_boxes, _ = stages["roi_heads"]
        if "roi_heads.keypoint_head" in stages:
            counts = [len(x["boxes"]) for x in in_boxes]
            heatmaps = stages["roi_heads.keypoint_head"].split(counts)
            pairs = zip(in_boxes, heatmaps, strict=True)
            in_boxes = [x | {"keypoint_heatmaps": of_image} for x, of_image in pairs]
        return results, in_boxes
