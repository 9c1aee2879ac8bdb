"""An engine's detector opened up, so that two engines can be compared and timed.

`moco_det.native.engine.inference` and `moco_det.plugin.probe` each hold a `Probe` that says how its
engine is fed and looked into; what is measured, and in which order, is the same code for both.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Quantities = dict[str, list[Tensor]]

STAGES = (
    "backbone",
    "sem_seg_head",
    "proposal_generator",
    "proposal_generator.rpn_head",
    "roi_heads",
    "roi_heads.keypoint_head",
)


class EngineProbe(ABC):
    """
    Args:
        model: a detector with Detectron2's parameter names and calling convention: a list of
            inputs -> losses by name in training, detections in evaluation.
        optimizer: over its trainable parameters.

    An item, the input of all methods, is what the native engine trains on: a dict with "image"
    (3, H, W), "gt_boxes" (G, 4) in its pixels, "gt_classes" (G,), with a mask head "gt_masks", with
    a keypoint head "gt_keypoints", for dense pose "gt_densepose", and the "height" and "width" of
    the original image. For semantic segmentation "sem_seg" (H, W) instead of objects, for
    depth "depth" (H, W).
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        self.model = model
        self.optimizer = optimizer

    def inputs(self, items: list[dict]) -> list[dict]:
        """Items in the engine's own format."""
        return items

    def losses(self, items: list[dict]) -> dict[str, Tensor]:
        """The losses by Detectron2's names; the model is in training mode."""
        return self.model(self.inputs(items))

    @abstractmethod
    def proposals(self, items: list[dict], stages: dict[str, Any]) -> tuple[list, list]:
        """Boxes (P, 4) and scores (P,) of each image, of a detector in evaluation mode.

        `stages` has what the layers of `STAGES` return for these items.
        """

    @abstractmethod
    def detections(self, results: list, stages: dict[str, Any]) -> tuple[list[dict], list[dict]]:
        """`results` of a detector as those of the native one, and what its heads found for them.

        The latter are, with the heads that there are, "mask_probabilities" (D, M, M) in the boxes,
        "keypoint_heatmaps" (D, P, S, S), and the `Charts` "charts".
        """

    def outputs(self, items: list[dict]) -> Quantities:
        """What the model in evaluation mode computes, stage by stage, in this order:

        "features NAME", "RPN logits on NAME" and "RPN deltas on NAME" for each map, (N, C, H, W);
        then lists with one tensor for each image: "proposal boxes" (P, 4), "proposal scores" (P,),
        "detection boxes" (D, 4), "detection scores" (D,), "detection classes" (D,); with a mask
        head "mask probabilities" (D, M, M) in the boxes, "detection masks" bool (D, H, W); with a
        keypoint head "keypoint heatmaps" (D, P, S, S), "detection keypoints" (D, P, 2) and
        "keypoint scores" (D, P); of dense pose "charts coarse", "charts fine", "charts u" and
        "charts v" (D, C, S, S), and `of_surfaces`. Detections are on the original image.

        Of semantic segmentation, after the features: "pixel logits" (N, K, H, W) of the batch, and
        "pixel scores" (K, height, width) of each original image; of depth, K is 1 in the first, and
        instead of the second there are "pixel depths" (height, width).
        """
        with recording(self.model, STAGES) as stages:
            results = self.model(self.inputs(items))
        found = {f"features {name}": [feature] for name, feature in stages["backbone"].items()}
        if "sem_seg_head" in stages:
            logits = stages["sem_seg_head"]
            # Detectron2's head returns its losses as well.
            found["pixel logits"] = [logits[0] if isinstance(logits, tuple) else logits]
            if "depth" in results[0]:
                return found | {"pixel depths": [x["depth"] for x in results]}
            return found | {"pixel scores": [x["sem_seg"] for x in results]}
        maps = self.model.proposal_generator.in_features
        on_maps = zip(maps, *stages["proposal_generator.rpn_head"], strict=True)
        for name, logits, deltas in on_maps:
            found |= {f"RPN logits on {name}": [logits], f"RPN deltas on {name}": [deltas]}
        found["proposal boxes"], found["proposal scores"] = self.proposals(items, stages)
        return found | of_detections(*self.detections(results, stages))

    def quantities(self, items: list[dict], seed: int) -> Quantities:
        """All that two engines with the same weights should agree on.

        `outputs`; the losses, one by one, with anchors and proposals sampled from `seed`; the
        gradients of the first trainable layer and of the last; and all parameters and running
        statistics after one step of the optimizer. Gradients and parameters are put together
        `by_layer`. The model is put back to what it was.

        Gradients are computed in float64. In float32 two orders of summation put a few of millions
        of values on different sides of a ReLU, and a gradient is as different as that makes it.
        """
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        # Inference, stage by stage.
        self.model.eval()
        with torch.no_grad():
            found = self.outputs(items)
        # Losses.
        self.model.train()
        torch.manual_seed(seed)
        with torch.no_grad():
            found |= {name: [loss] for name, loss in self.losses(items).items()}
        self.model.load_state_dict(before)
        # Gradients, in float64.
        self._to_double()
        torch.manual_seed(seed)
        self.optimizer.zero_grad()
        sum(self.losses(items).values()).backward()
        parameters = dict(self.model.named_parameters())
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        gradients = by_layer({name: p.grad for name, p in trained.items()})
        for layer in end_layers(list(trained)):
            found[f"gradient of {layer}"] = [gradients[layer]]
        # A step with them.
        self.optimizer.step()
        found["parameters after a step"] = list(by_layer(parameters).values())
        found["statistics after a step"] = [
            value.clone()
            for name, value in self.model.state_dict().items()
            if name.endswith(("running_mean", "running_var"))
        ]
        self.model.float().load_state_dict(before)
        self.optimizer.zero_grad()
        self.optimizer.state.clear()
        return found

    def _to_double(self) -> None:
        """The network in float64; boxes stay float32, as NMS and Detectron2's `Boxes` want them."""
        self.model.double()
        if hasattr(self.model, "proposal_generator"):
            self.model.proposal_generator.anchor_generator.float()

    def train_step(self, items: list[dict], amp: bool) -> None:
        """Losses, gradients, one step of the optimizer."""
        self.model.train()
        with self.autocast(amp):
            loss = sum(self.losses(items).values())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def infer(self, items: list[dict], amp: bool) -> list:
        """The detections in each image, in the engine's own format."""
        self.model.eval()
        with torch.no_grad(), self.autocast(amp):
            return self.model(self.inputs(items))

    def autocast(self, amp: bool) -> torch.autocast:
        """bfloat16, on any device: unlike float16 it needs no loss scaling."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=amp)


def of_detections(detections: list[dict], in_boxes: list[dict]) -> Quantities:
    """See `EngineProbe.detections` and `EngineProbe.outputs`."""
    keys = ("boxes", "scores", "classes")
    found = {f"detection {key}": [x[key] for x in detections] for key in keys}
    if "masks" in detections[0]:
        found["mask probabilities"] = [x["mask_probabilities"] for x in in_boxes]
        found["detection masks"] = [x["masks"] for x in detections]
    if "keypoints" in detections[0]:
        found["keypoint heatmaps"] = [x["keypoint_heatmaps"] for x in in_boxes]
        found["detection keypoints"] = [x["keypoints"][..., :2] for x in detections]
        found["keypoint scores"] = [x["keypoints"][..., 2] for x in detections]
    if "densepose" in detections[0]:
        for name in ("coarse", "fine", "u", "v"):
            found[f"charts {name}"] = [getattr(x["charts"], name) for x in in_boxes]
        found |= of_surfaces([x["densepose"] for x in detections])
    return found


def of_surfaces(surfaces: list[list[Tensor]]) -> Quantities:
    """What becomes comparable of dense pose, uint8 (3, h, w) for each detection of each image.

    Of the pixels of all boxes of an image together "detection charts", bool (25, pixels), and
    "mean U and V" (2,). Of a single one U and V are not: about U * 255 rounding decides.
    """
    numbers = torch.arange(25)[:, None]
    pixels = [
        torch.cat([torch.zeros(3, 0), *(s.flatten(1).cpu() for s in of_image)], dim=1)
        for of_image in surfaces
    ]
    return {
        "detection charts": [of_image[0] == numbers for of_image in pixels],
        "mean U and V": [
            of_image[1:].sum(1) / 255 / max(1, of_image.shape[1]) for of_image in pixels
        ],
    }


@contextmanager
def recording(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the layers of these names last returned; without those that `model` has not."""
    outputs = {}

    def record(name: str, layer: nn.Module, inputs: tuple, output: Any) -> None:
        outputs[name] = output

    layers = {name: layer for name, layer in model.named_modules() if name in names}
    handles = [x.register_forward_hook(partial(record, name)) for name, x in layers.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def by_layer(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays of each layer in one, flattened, to be compared on one scale.

    By itself a bias may be 0 but for rounding, and its gradient with it, as before the softmax over
    the cells of a heatmap: relative to itself, two engines' rounding then differs without bound.
    """
    layers: dict[str, list[Tensor]] = {}
    for name, array in arrays.items():
        layers.setdefault(name.rpartition(".")[0], []).append(array.detach().flatten())
    return {layer: torch.cat(parts) for layer, parts in layers.items()}


def end_layers(parameters: list[str]) -> tuple[str, str]:
    """The layers of the first and the last of the named parameters, in the order of computation.

    An FPN registers its own layers before the network that feeds them.
    """
    ordered = sorted(parameters, key=lambda name: not name.startswith("backbone.bottom_up."))
    return ordered[0].rpartition(".")[0], ordered[-1].rpartition(".")[0]
