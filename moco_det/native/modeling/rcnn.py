"""Faster, Mask, Keypoint and DensePose R-CNN, put together from Detectron2's config keys.

    images -> backbone -> feature maps -> RPN -> proposals -> ROI heads -> detections

Parameters are called as in Detectron2, so that either engine loads the other's weights.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from moco_det.config.checks import is_semantic
from moco_det.config.loading import check_supported
from moco_det.densepose.points import DensePosePoints
from moco_det.native.modeling.backbones import (
    build_resnet,
    build_resnet_dilated_c5,
    build_resnet_fpn,
)
from moco_det.native.modeling.batching import batch_images
from moco_det.native.modeling.boxes import nonempty
from moco_det.native.modeling.densepose_head import surfaces
from moco_det.native.modeling.layers import sync_on_cpu
from moco_det.native.modeling.mask_head import paste_masks
from moco_det.native.modeling.roi_heads import DensePoseROIHeads, build_roi_heads
from moco_det.native.modeling.rpn import build_rpn
from moco_det.native.modeling.sampling import Targets
from moco_det.native.modeling.semantic_segmentor import build_semantic_segmentor

BACKBONES = {
    "build_resnet_backbone": build_resnet,
    "build_resnet_fpn_backbone": build_resnet_fpn,
    "build_resnet_dilated_c5_backbone": build_resnet_dilated_c5,
}


class GeneralizedRCNN(nn.Module):
    """A two-stage detector.

    Args:
        backbone: images -> {name: feature map}, with the attribute `size_divisibility`.
        proposal_generator: an `RPN`.
        roi_heads: an `ROIHeads`.
        pixel_mean, pixel_std: per channel, in the input's channel order and 0-255 scale.
    """

    def __init__(
        self,
        backbone: nn.Module,
        proposal_generator: nn.Module,
        roi_heads: nn.Module,
        pixel_mean: list[float],
        pixel_std: list[float],
    ):
        super().__init__()
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            buffer = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batch: list[dict]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """
        Args:
            batch: one dict per image. "image": (3, H, W), uint8 or float, 0-255, channels in the
                order of INPUT.FORMAT, on any device. In training also "gt_boxes" (G, 4) float32, in
                pixels of that image, and "gt_classes" (G,) int64; G may be 0. With a mask head
                "gt_masks", polygons for each object or bool (G, H, W); with a keypoint head
                "gt_keypoints" (G, P, 3) float32 of x, y, visibility; for dense pose "gt_densepose",
                a `DensePosePoints` or None for each object. In inference optionally "height" and
                "width" of the original image.

        Returns:
            In training the losses "loss_cls", "loss_box_reg", "loss_mask", "loss_keypoint" and
            "loss_densepose_U", "_V", "_I", "_S" of the heads that there are, "loss_rpn_cls",
            "loss_rpn_loc".
            In inference one dict per image, best detection first: "boxes" (D, 4) in pixels of the
            original image (of the input, without "height" and "width"), "scores" (D,), "classes"
            (D,), and with their heads "masks", bool (D, H, W) of that image, "keypoints" (D, P, 3)
            of x, y, score, and "densepose", D tensors (3, h, w) of `densepose_head.surfaces`, on
            the model's device.
        """
        if not self.training:
            return self.detect(batch)
        truth = self.ground_truth(batch)
        images, sizes = self.preprocess([x["image"] for x in batch])
        features = self.backbone(images)
        proposals, rpn_losses = self.proposal_generator(features, sizes, truth.boxes)
        _, losses = self.roi_heads(features, sizes, proposals, truth)
        return losses | rpn_losses

    def ground_truth(self, batch: list[dict]) -> Targets:
        """What is needed of the batch's, on the model's device but for polygons."""

        def collect(key: str) -> list:
            return [
                x[key].to(self.device, non_blocking=True) if isinstance(x[key], Tensor) else x[key]
                for x in batch
            ]

        return Targets(
            collect("gt_boxes"),
            collect("gt_classes"),
            collect("gt_masks") if self.roi_heads.mask_head is not None else None,
            collect("gt_keypoints") if self.roi_heads.keypoint_head is not None else None,
            self._dense_pose(batch) if isinstance(self.roi_heads, DensePoseROIHeads) else None,
        )

    def _dense_pose(self, batch: list[dict]) -> list[list[DensePosePoints | None]]:
        return [
            [found if found is None else found.to(self.device) for found in x["gt_densepose"]]
            for x in batch
        ]

    @torch.no_grad()
    def detect(self, batch: list[dict]) -> list[dict[str, Tensor]]:
        images, sizes = self.preprocess([x["image"] for x in batch])
        features = self.backbone(images)
        proposals, _ = self.proposal_generator(features, sizes)
        detections, _ = self.roi_heads(features, sizes, proposals)
        return [
            rescale(found, size, (x.get("height", size[0]), x.get("width", size[1])))
            for found, size, x in zip(detections, sizes, batch, strict=True)
        ]

    def preprocess(self, images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """See `batch_images`."""
        multiple = self.backbone.size_divisibility
        return batch_images(images, self.pixel_mean, self.pixel_std, multiple)


def rescale(
    detections: dict[str, Tensor], size: tuple[int, int], original: tuple[int, int]
) -> dict[str, Tensor]:
    """Detections in an image of `size` (height, width) -> in the `original`; empty ones dropped.

    "mask_probabilities" (D, M, M) in the boxes become "masks", bool (D, *original); "charts" become
    "densepose", see `surfaces`.
    """
    scale = detections["boxes"].new_tensor([original[1] / size[1], original[0] / size[0]])
    boxes = clip_boxes_to_image(detections["boxes"] * scale.repeat(2), original)
    keep = nonempty(boxes)
    found = {key: value[keep] for key, value in (detections | {"boxes": boxes}).items()}
    if "keypoints" in found:
        found["keypoints"][..., :2] *= scale
    if "mask_probabilities" in found:
        probabilities = found.pop("mask_probabilities")
        found["masks"] = paste_masks(probabilities, found["boxes"], original)
    if "charts" in found:
        found["densepose"] = surfaces(found.pop("charts"), found["boxes"])
    return found


def build_backbone(cfg) -> nn.Module:
    """The feature extractor that MODEL.BACKBONE.NAME names."""
    check_supported(cfg)
    return BACKBONES[cfg.MODEL.BACKBONE.NAME](cfg)


def build_rcnn(cfg, backbone: nn.Module) -> GeneralizedRCNN:
    return GeneralizedRCNN(
        backbone,
        build_rpn(cfg, backbone),
        build_roi_heads(cfg, backbone),
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )


def build_model(cfg) -> nn.Module:
    """The model on `cfg.MODEL.DEVICE`, in training mode, at its random initialisation.

    UserError where the config asks for what the native engine does not have.
    """
    build = build_semantic_segmentor if is_semantic(cfg) else build_rcnn
    model = build(cfg, build_backbone(cfg))
    model.to(cfg.MODEL.DEVICE)
    if model.device.type == "cpu":
        sync_on_cpu(model)
    return model
