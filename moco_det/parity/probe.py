"""An engine's detector opened up, so that two engines can be compared and timed.

`moco_det.native.engine.probe` and `moco_det.plugin.probe` each hold a `Probe` that says how its
engine is fed and looked into; what is measured, and in which order, is the same code for both.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Quantities = dict[str, list[Tensor]]


class EngineProbe(ABC):
    """
    Args:
        model: a detector with Detectron2's parameter names and calling convention: a list of
            inputs -> losses by name in training, detections in evaluation.
        optimizer: over its trainable parameters.

    An item, the input of all methods, is what the native engine trains on: a dict with "image"
    (3, H, W), "gt_boxes" (G, 4) in its pixels, "gt_classes" (G,), with a mask head "gt_masks", with
    a keypoint head "gt_keypoints", for dense pose "gt_densepose", and the "height" and "width" of
    the original image. For semantic segmentation "sem_seg" (H, W) instead of objects.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        self.model = model
        self.optimizer = optimizer

    @abstractmethod
    def inputs(self, items: list[dict]) -> list[dict]:
        """Items in the engine's own format."""

    @abstractmethod
    def losses(self, items: list[dict]) -> dict[str, Tensor]:
        """The losses by Detectron2's names; the model is in training mode."""

    @abstractmethod
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
        "pixel scores" (K, height, width) of each original image.
        """

    def quantities(self, items: list[dict], seed: int) -> Quantities:
        """All that two engines with the same weights should agree on.

        `outputs`; the losses, one by one, with anchors and proposals sampled from `seed`; the
        gradients of the first trainable layer and of the last; and all parameters and running
        statistics after one step of the optimizer. The model is put back to what it was.

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
        for layer in end_layers([n for n, p in parameters.items() if p.requires_grad]):
            gradients = [p.grad for n, p in parameters.items() if n.rpartition(".")[0] == layer]
            # In one: that of a bias may be 0 but for rounding, as before the softmax over cells.
            found[f"gradient of {layer}"] = [torch.cat([g.flatten() for g in gradients])]
        # A step with them.
        self.optimizer.step()
        found["parameters after a step"] = [p.detach().clone() for p in parameters.values()]
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

    def infer(self, item: dict, amp: bool) -> list:
        """The detections in one image, in the engine's own format."""
        self.model.eval()
        with torch.no_grad(), self.autocast(amp):
            return self.model(self.inputs([item]))

    def autocast(self, amp: bool) -> torch.autocast:
        """bfloat16, on any device: unlike float16 it needs no loss scaling."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=amp)


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
def recording(layer: nn.Module | None) -> Iterator[list[Any]]:
    """A list of what each forward pass of `layer` returns; empty without a layer."""
    outputs = []
    if layer is None:
        yield outputs
        return
    handle = layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def end_layers(parameters: list[str]) -> tuple[str, str]:
    """The layers of the first and the last of the named parameters, in the order of computation.

    An FPN registers its own layers before the network that feeds them.
    """
    ordered = sorted(parameters, key=lambda name: not name.startswith("backbone.bottom_up."))
    return ordered[0].rpartition(".")[0], ordered[-1].rpartition(".")[0]
