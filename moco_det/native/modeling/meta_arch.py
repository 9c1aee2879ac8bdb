"""The three meta-architectures, on the base that they share, and `build_model`.

    GeneralizedRCNN    images -> backbone -> RPN -> proposals -> ROI heads -> detections
    SemanticSegmentor  images -> backbone -> semantic head -> a score per class and pixel
    DepthEstimator     images -> backbone -> depth head -> metres per pixel

Behaviour and parameter names are Detectron2's, so that either engine loads the other's weights.

Shapes: N images, each (3, h, w), padded to one size (N, 3, H, W); D detections in one image,
K classes, P keypoints of an object, M the side of a predicted mask.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import clip_boxes_to_image

from moco_det.config.checks import is_depth, is_per_pixel
from moco_det.densepose.points import DensePosePoints
from moco_det.native.modeling.backbones import build_backbone
from moco_det.native.modeling.boxes import Losses, Size, Targets, nonempty, positions
from moco_det.native.modeling.densepose_head import surfaces
from moco_det.native.modeling.layers import on_gpu, sync_on_cpu
from moco_det.native.modeling.mask_head import paste_masks
from moco_det.native.modeling.roi_heads import (
    DensePoseROIHeads,
    Detections,
    build_roi_heads,
)
from moco_det.native.modeling.rpn import build_rpn
from moco_det.native.modeling.semantic_head import build_semantic_head


class MetaArchitecture(nn.Module):
    """What detectors and segmentors share: the backbone, and images of any size as one batch.

    Args:
        backbone: images -> {name: feature map}, with the attribute `size_divisibility`.
        pixel_mean, pixel_std: per channel, in the input's channel order and 0-255 scale.
    """

    def __init__(self, backbone: nn.Module, pixel_mean: list[float], pixel_std: list[float]):
        super().__init__()
        self.backbone = backbone
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            buffer = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batch: list[dict]) -> Losses | list[dict[str, Tensor]]:
        """The losses by name in training, see `losses`; else a dict per image, see `inference`.

        Args:
            batch: one dict per image. "image": (3, h, w), uint8 or float, 0-255, channels in the
                order of INPUT.FORMAT, on any device. In training also the targets, in inference
                optionally the "height" and "width" of the original image.
        """
        return self.losses(batch) if self.training else self.inference(batch)

    def losses(self, batch: list[dict]) -> Losses:
        raise NotImplementedError

    def inference(self, batch: list[dict]) -> list[dict[str, Tensor]]:
        raise NotImplementedError

    def preprocess(self, batch: list[dict]) -> tuple[Tensor, list[Size]]:
        """Normalise on the model's device and pad with zeros to one size (N, 3, H, W).

        H and W are multiples of the backbone's `size_divisibility`. Also returns the (height,
        width) of each image before padding (both as Detectron2's ImageList). Images travel as they
        are, in bytes.
        """
        images = [x["image"] for x in batch]
        sizes = [(x.shape[-2], x.shape[-1]) for x in images]
        multiple = self.backbone.size_divisibility
        height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes, strict=True))
        # As one tensor, then normalised, then 0 where there is no image.
        raw = torch.empty(
            (len(images), 3, height, width),
            dtype=reduce(torch.promote_types, [x.dtype for x in images]),
            device=self.device,
            memory_format=memory_format(self.pixel_mean),
        )
        for target, image, (h, w) in zip(raw, images, sizes, strict=True):
            target[:, :h, :w] = image.to(self.device, non_blocking=True)
        padded = (raw - self.pixel_mean).div_(self.pixel_std)
        for target, (h, w) in zip(padded, sizes, strict=True):
            target[:, h:] = target[:, :, w:] = 0
        return padded, sizes


def memory_format(x: Tensor) -> torch.memory_format:
    """Of images and weights: with which convolutions are fastest where `x` is.

    Once images and weights have it, every map between has: nothing is rearranged on the way.
    """
    return torch.channels_last if on_gpu(x) else torch.contiguous_format


def original_size(item: dict, size: Size) -> Size:
    """The (height, width) that the results of an input are wanted in: its own `size` by default."""
    return item.get("height", size[0]), item.get("width", size[1])


# -- detection ------------------------------------------------------------------------------------


class GeneralizedRCNN(MetaArchitecture):
    """A two-stage detector: Faster, Mask, Keypoint or DensePose R-CNN.

    Args:
        backbone, pixel_mean, pixel_std: see `MetaArchitecture`.
        proposal_generator: an `RPN`.
        roi_heads: an `ROIHeads`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        proposal_generator: nn.Module,
        roi_heads: nn.Module,
        pixel_mean: list[float],
        pixel_std: list[float],
    ):
        super().__init__(backbone, pixel_mean, pixel_std)
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads

    def losses(self, batch: list[dict]) -> Losses:
        """
        Args:
            batch: of G objects, which may be 0, in pixels of their image: "gt_boxes" (G, 4)
                float32, "gt_classes" (G,) int64; with a mask head "gt_masks", polygons for each
                object or bool (G, h, w); with a keypoint head "gt_keypoints" (G, P, 3) float32 of
                x, y, visibility; for dense pose "gt_densepose", a `DensePosePoints` or None for
                each object.

        Returns:
            "loss_cls", "loss_box_reg", "loss_mask", "loss_keypoint" and "loss_densepose_U", "_V",
            "_I", "_S" of the heads that there are; "loss_rpn_cls", "loss_rpn_loc".
        """
        targets = self.gather_targets(batch)
        images, sizes = self.preprocess(batch)
        features = self.backbone(images)
        proposals, rpn_losses = self.proposal_generator(features, sizes, targets.boxes)
        _, losses = self.roi_heads(features, sizes, proposals, targets)
        return losses | rpn_losses

    def gather_targets(self, batch: list[dict]) -> Targets:
        """Those that the heads need, on the model's device but for polygons."""
        heads = self.roi_heads

        def collect(key: str) -> list:
            return [self._on_device(x[key]) for x in batch]

        return Targets(
            collect("gt_boxes"),
            collect("gt_classes"),
            masks=collect("gt_masks") if heads.mask_head is not None else None,
            keypoints=collect("gt_keypoints") if heads.keypoint_head is not None else None,
            densepose=collect("gt_densepose") if isinstance(heads, DensePoseROIHeads) else None,
        )

    def _on_device(self, value: Any) -> Any:
        """A tensor or an object's points; of each object in a list; polygons are left alone."""
        if isinstance(value, list):
            return [self._on_device(of_object) for of_object in value]
        if isinstance(value, Tensor):
            return value.to(self.device, non_blocking=True)
        return value.to(self.device) if isinstance(value, DensePosePoints) else value

    @torch.no_grad()
    def inference(self, batch: list[dict]) -> list[dict[str, Tensor]]:
        """The detections, best first, in pixels of the original image (of the input by default).

        Returns:
            "boxes" (D, 4), "scores" (D,), "classes" (D,), and with their heads "masks", bool
            (D, height, width), "keypoints" (D, P, 3) of x, y, score, and "densepose", D tensors
            (3, h, w) of `densepose_head.surfaces`; all on the model's device.
        """
        images, sizes = self.preprocess(batch)
        features = self.backbone(images)
        proposals, _ = self.proposal_generator(features, sizes)
        detections, _ = self.roi_heads(features, sizes, proposals)
        originals = [original_size(*pair) for pair in zip(batch, sizes, strict=True)]
        return detector_postprocess(detections, sizes, originals)


def detector_postprocess(
    detections: Detections, sizes: list[Size], originals: list[Size]
) -> list[dict[str, Tensor]]:
    """Detections in images of `sizes` -> in the `originals`; those left empty are dropped.

    "mask_probabilities" (D, M, M) in the boxes become "masks", bool (D, *original); "charts" become
    "densepose", see `densepose_head.surfaces`.
    """
    # Boxes and points first: what is empty on the original image has no mask there.
    images = zip(detections, sizes, originals, strict=True)
    moved = [_on_original(found, size, original) for found, size, original in images]
    filled = pad_sequence([nonempty(found["boxes"]) for found in moved], batch_first=True)
    kept = [
        {key: value[index] for key, value in found.items()}
        for found, index in zip(moved, positions(filled), strict=True)
    ]
    # Then what lies in them.
    return [_pasted(*pair) for pair in zip(kept, originals, strict=True)]


def _on_original(detections: dict, size: Size, original: Size) -> dict:
    """Boxes and keypoints in pixels of the original image, the boxes clipped to it."""
    down, right = original[0] / size[0], original[1] / size[1]
    x0, y0, x1, y1 = detections["boxes"].unbind(1)
    boxes = torch.stack([x0 * right, y0 * down, x1 * right, y1 * down], dim=1)
    moved = detections | {"boxes": clip_boxes_to_image(boxes, original)}
    if "keypoints" in detections:
        x, y, scores = detections["keypoints"].unbind(2)
        moved["keypoints"] = torch.stack([x * right, y * down, scores], dim=2)
    return moved


def _pasted(found: dict, original: Size) -> dict[str, Tensor]:
    """What was predicted in the boxes, put on the original image."""
    if "mask_probabilities" in found:
        probabilities = found.pop("mask_probabilities")
        found["masks"] = paste_masks(probabilities, found["boxes"], original)
    if "charts" in found:
        found["densepose"] = surfaces(found.pop("charts"), found["boxes"])
    return found


# -- semantic segmentation, depth -----------------------------------------------------------------


class SemanticSegmentor(MetaArchitecture):
    """A backbone and a head that gives every pixel a score for every class.

    Args:
        backbone, pixel_mean, pixel_std: see `MetaArchitecture`.
        sem_seg_head: an `FCN16Head`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sem_seg_head: nn.Module,
        pixel_mean: list[float],
        pixel_std: list[float],
    ):
        super().__init__(backbone, pixel_mean, pixel_std)
        self.sem_seg_head = sem_seg_head

    def losses(self, batch: list[dict]) -> Losses:
        """{"loss_sem_seg"} of a batch with the label maps "sem_seg" (h, w) int64."""
        images, _ = self.preprocess(batch)
        labels = self.batch_maps([x["sem_seg"] for x in batch], images.shape[-2:])
        return self.sem_seg_head.losses(self.sem_seg_head(self.backbone(images)), labels)

    def batch_maps(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        """Maps of the targets, each (h, w), padded with what is ignored to (N, *size)."""
        shape, ignored = (len(maps), *size), self.sem_seg_head.ignore_value
        padded = torch.full(shape, ignored, dtype=maps[0].dtype, device=self.device)
        for target, values in zip(padded, maps, strict=True):
            target[: values.shape[0], : values.shape[1]] = values.to(self.device, non_blocking=True)
        return padded

    @torch.no_grad()
    def inference(self, batch: list[dict]) -> list[dict[str, Tensor]]:
        """{"sem_seg": logits (K, height, width)} of each original image (the input by default)."""
        images, sizes = self.preprocess(batch)
        logits = self.sem_seg_head(self.backbone(images))
        return [
            {"sem_seg": sem_seg_postprocess(one, size, original_size(x, size))}
            for one, size, x in zip(logits, sizes, batch, strict=True)
        ]


class DepthEstimator(SemanticSegmentor):
    """A backbone and a head that says how far away every pixel is.

    Args:
        backbone, pixel_mean, pixel_std: see `MetaArchitecture`.
        sem_seg_head: an `FCNDepthHead`.
    """

    def losses(self, batch: list[dict]) -> Losses:
        """{"loss_depth"} of a batch with the depth maps "depth" (h, w) float32."""
        return super().losses([{**x, "sem_seg": x["depth"]} for x in batch])

    @torch.no_grad()
    def inference(self, batch: list[dict]) -> list[dict[str, Tensor]]:
        """{"depth": metres (height, width)} of each original image (the input by default)."""
        return [{"depth": found["sem_seg"][0]} for found in super().inference(batch)]


def sem_seg_postprocess(logits: Tensor, size: Size, original: Size) -> Tensor:
    """Logits (K, H, W) of a padded image -> (K, *original) of the image of `size` in it."""
    logits = logits[:, : size[0], : size[1]]
    if tuple(original) == tuple(size):
        return logits
    # Here pixels are areas, as in the resizing that made the input of the original.
    return F.interpolate(logits[None], size=original, mode="bilinear", align_corners=False)[0]


# -- from a config --------------------------------------------------------------------------------


def build_model(cfg) -> MetaArchitecture:
    """The model on `cfg.MODEL.DEVICE`, in training mode, at its random initialisation.

    Raises:
        UserError: the config asks for what the native engine does not have.
    """
    backbone = build_backbone(cfg)
    pixels = {"pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD}
    if is_per_pixel(cfg):
        kind = DepthEstimator if is_depth(cfg) else SemanticSegmentor
        model = kind(backbone, build_semantic_head(cfg, backbone), **pixels)
    else:
        rpn, heads = build_rpn(cfg, backbone), build_roi_heads(cfg, backbone)
        model = GeneralizedRCNN(backbone, rpn, heads, **pixels)
    model.to(cfg.MODEL.DEVICE)
    model.to(memory_format=memory_format(model.pixel_mean))
    if model.device.type == "cpu":
        sync_on_cpu(model)
    return model
