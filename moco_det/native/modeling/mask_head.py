"""The mask branch of Mask R-CNN (He et al. 2017): network, targets, loss, masks on the image.

Shapes: N images, Ri proposals in image i, R = sum(Ri), Gi objects in image i, K classes, C
channels, M the side of a predicted mask, D detections in one image.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.ops import roi_align

from moco_det.common.gpus import upload
from moco_det.native.modeling.boxes import Losses, Masks, SampledProposals, Size
from moco_det.native.modeling.layers import ConvNorm, on_gpu


class ClassConv(nn.Conv2d):
    """A 1x1 convolution that computes, for each proposal, only one of its output channels.

    Of the masks of all classes only one is ever looked at. Where there are many, the others would
    take more memory than the rest of the head: with LVIS's 1230 classes, 4 MB for each proposal.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, channel: Tensor) -> Tensor:
        """(R, C, H, W), and int64 (R,) -> (R, H, W)."""
        product = torch.einsum("rchw,rc->rhw", x, self.weight[channel, :, 0, 0])
        return product + self.bias[channel, None, None]


class MaskRCNNConvUpsampleHead(nn.Module):
    """3x3 convolutions, upsampling by a 2x2 transposed one, and a mask for each class.

    Figure 4 of the paper: no convolution before the upsampling on res5 (C4), four with an FPN.

    Args:
        channels: of the pooled input.
        num_classes: K.
        num_conv: how many 3x3 convolutions there are.
        dim: width of all layers.
        norm: normalisation after every 3x3 convolution, "" for none.
        class_agnostic: one mask per proposal rather than one for each class.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        num_conv: int,
        dim: int,
        norm: str,
        class_agnostic: bool,
    ):
        super().__init__()
        self.class_agnostic = class_agnostic
        self.convs = [f"mask_fcn{k}" for k in range(1, num_conv + 1)]
        for name in self.convs:
            self.add_module(name, ConvNorm(channels, dim, 3, norm))
            channels = dim
        self.deconv = nn.ConvTranspose2d(channels, dim, kernel_size=2, stride=2)
        self.predictor = ClassConv(dim, 1 if class_agnostic else num_classes)
        for name in (*self.convs, "deconv"):
            c2_msra_fill(getattr(self, name))
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """(R, C, M / 2, M / 2), and the proposals' classes (R,) -> logits (R, M, M) of these."""
        for name in self.convs:
            x = F.relu_(getattr(self, name)(x))
        x = F.relu_(self.deconv(x))
        channel = torch.zeros_like(classes) if self.class_agnostic else classes
        logits = self.predictor(x, channel)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def losses(self, x: Tensor, sampled: SampledProposals, masks: list[Masks]) -> Losses:
        """Mean binary cross-entropy over all pixels of the masks of foreground proposals.

        Without any it is 0, and still has gradients: all processes of a run wait for them.

        Args:
            x: (R, C, M / 2, M / 2), what was pooled for `sampled`, which are all foreground.
            masks: of the N images' objects.
        """
        # Polygons are drawn by the host. It asks where before the head's work is queued, and draws
        # while the device does that.
        on_host = not any(isinstance(of_image, Tensor) for of_image in masks)
        located = sampled.on_host() if on_host else sampled
        logits = self(x, sampled.classes)
        targets = mask_targets(masks, located, logits.shape[-1])
        targets = upload(targets, logits.device).to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return {"loss_mask": loss / max(targets.numel(), 1)}

    def predict(self, x: Tensor, classes: Tensor) -> Tensor:
        """(R, C, M / 2, M / 2), (R,) -> (R, M, M), how likely the object covers a pixel."""
        return self(x, classes).sigmoid()


def mask_targets(masks: list[Masks], sampled: SampledProposals, side: int) -> Tensor:
    """The part of its object's mask in each proposal: bool (R, side, side).

    As in Detectron2, polygons are drawn on the proposal's own grid by the COCO API, which decides
    which pixels they cover; bit masks are averaged over each pixel of that grid, and cover those of
    which they cover half. The former happens on the host, where `sampled` has to be then.
    """
    targets = []
    for of_image, boxes, matched in zip(masks, sampled.boxes, sampled.matched, strict=True):
        crop = crop_bit_masks if isinstance(of_image, Tensor) else crop_polygons
        targets.append(crop(of_image, matched, boxes, side))
    return torch.cat(targets)


def crop_polygons(
    polygons: list[list[np.ndarray]], matched: Tensor, boxes: Tensor, side: int
) -> Tensor:
    """Objects `matched` (R,), each in its box (R, 4) -> bool (R, side, side), all on the host."""
    crops = torch.zeros((len(boxes), side, side), dtype=torch.bool)
    for crop, index, box in zip(crops, matched.numpy(), boxes.numpy(), strict=True):
        crop.copy_(torch.from_numpy(rasterise(polygons[index], box, side)))
    return crops


def rasterise(polygons: list[np.ndarray], box: np.ndarray, side: int) -> np.ndarray:
    """The part of one object's polygons that is in `box` (4,), drawn: uint8 (side, side)."""
    scale = side / np.maximum(box[2:] - box[:2], 0.1)  # a box may be as thin as it likes
    moved = [((p.reshape(-1, 2) - box[:2]) * scale).reshape(-1) for p in polygons]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, side, side)))


def crop_bit_masks(masks: Tensor, matched: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Objects `matched` (R,) of (G, H, W), each in its box (R, 4) -> bool (R, side, side).

    Not by `pooling.roi_align`, whose memory grows with the regions' areas on the map, here the
    image itself.
    """
    # Each object is an "image" of one channel to pool from.
    rois = torch.cat([matched[:, None].to(boxes.dtype), boxes], dim=1)
    return roi_align(masks[:, None].to(boxes.dtype), rois, side, aligned=True)[:, 0] >= 0.5


def paste_masks(probabilities: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Masks in boxes -> masks on the image: where the object is at least as likely as not.

    Detectron2's convention: a pixel is looked up at its centre, bilinearly, and beyond the mask's
    outermost centres it fades to 0.

    Args:
        probabilities: (D, M, M).
        boxes: (D, 4), not empty, inside the image.
        size: (height, width) of the image.

    Returns:
        bool (D, height, width). The memory that it takes beside that is one mask's; on a GPU, where
        many are pasted at once, that of a grid of `PIXELS_AT_ONCE`.
    """
    pasted = torch.zeros((len(boxes), *size), dtype=torch.bool, device=boxes.device)
    if on_gpu(boxes):
        at_once = max(1, PIXELS_AT_ONCE // max(1, math.prod(size)))
        for some in zip(*(x.split(at_once) for x in (pasted, probabilities, boxes)), strict=True):
            _paste_everywhere(*some)
    else:
        _paste_where_they_are(pasted, probabilities, boxes)
    return pasted


PIXELS_AT_ONCE = 1 << 26  # 0.5 GB of coordinates


def _paste_everywhere(pasted: Tensor, probabilities: Tensor, boxes: Tensor) -> None:
    """Fill `pasted` (D, height, width) with masks looked up at all its pixels."""
    height, width = pasted.shape[1:]
    # The centres of all pixels, relative to each box: (D, height, width, 2).
    corner, sides = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
    x = (torch.arange(width, device=boxes.device) + 0.5 - corner[..., 0]) / sides[..., 0] * 2 - 1
    y = (torch.arange(height, device=boxes.device) + 0.5 - corner[..., 1]) / sides[..., 1] * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    found = F.grid_sample(probabilities[:, None], grid, align_corners=False)
    torch.ge(found[:, 0], 0.5, out=pasted)


def _paste_where_they_are(pasted: Tensor, probabilities: Tensor, boxes: Tensor) -> None:
    """The same, mask by mask, and only at the pixels of its box."""
    # The pixels that each box touches. The probability at the border of a box is half of that
    # inside, so nothing is covered beyond.
    pixels = torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], dim=1).int().tolist()
    for mask, probability, box, (x0, y0, x1, y1) in zip(
        pasted, probabilities, boxes, pixels, strict=True
    ):
        # The centres of these pixels, relative to the box: from (-1, -1) to (1, 1) across it.
        corner, opposite = box.view(2, 1, 2).unbind()
        x = torch.arange(x0, x1, device=boxes.device) + 0.5
        y = torch.arange(y0, y1, device=boxes.device) + 0.5
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        grid = (centres - corner) / (opposite - corner) * 2 - 1
        # The predicted mask looked up there.
        found = F.grid_sample(probability[None, None], grid[None], align_corners=False)
        mask[y0:y1, x0:x1] = found[0, 0] >= 0.5


def build_mask_head(cfg, channels: int) -> MaskRCNNConvUpsampleHead:
    head = cfg.MODEL.ROI_MASK_HEAD
    return MaskRCNNConvUpsampleHead(
        channels,
        cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        num_conv=head.NUM_CONV,
        dim=head.CONV_DIM,
        norm=head.NORM,
        class_agnostic=head.CLS_AGNOSTIC_MASK,
    )
