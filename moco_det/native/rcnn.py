"""Faster R-CNN, put together from Detectron2's config keys.

    images -> backbone -> feature maps -> RPN -> proposals -> ROI heads -> detections

Parameters are called as in Detectron2, so that either engine loads the other's weights.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from moco_det.config import check_supported
from moco_det.native.boxes import nonempty
from moco_det.native.dilated_c5 import build_resnet_dilated_c5
from moco_det.native.fpn import build_resnet_fpn
from moco_det.native.layers import sync_on_cpu
from moco_det.native.resnet import build_resnet
from moco_det.native.roi_heads import build_roi_heads
from moco_det.native.rpn import build_rpn

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
                pixels of that image, and "gt_classes" (G,) int64; G may be 0. In inference
                optionally "height" and "width" of the original image.

        Returns:
            In training the losses "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc".
            In inference one dict per image, best detection first: "boxes" (D, 4) in pixels of the
            original image (of the input, without "height" and "width"), "scores" (D,) and
            "classes" (D,), on the model's device.
        """
        if not self.training:
            return self.detect(batch)
        gt_boxes = [x["gt_boxes"].to(self.device, non_blocking=True) for x in batch]
        gt_classes = [x["gt_classes"].to(self.device, non_blocking=True) for x in batch]
        images, sizes = self.preprocess([x["image"] for x in batch])
        features = self.backbone(images)
        proposals, rpn_losses = self.proposal_generator(features, sizes, gt_boxes)
        _, losses = self.roi_heads(features, sizes, proposals, gt_boxes, gt_classes)
        return losses | rpn_losses

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
        """Normalise on the model's device, pad with zeros to one size (N, 3, H, W).

        Also returns the (height, width) of each image before padding.
        """
        sizes = [(x.shape[-2], x.shape[-1]) for x in images]
        multiple = self.backbone.size_divisibility
        height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes, strict=True))
        padded = self.pixel_mean.new_zeros((len(images), 3, height, width))
        for target, image, (h, w) in zip(padded, images, sizes, strict=True):
            image = image.to(self.device, non_blocking=True)
            target[:, :h, :w] = (image - self.pixel_mean) / self.pixel_std
        return padded, sizes


def rescale(
    detections: dict[str, Tensor], size: tuple[int, int], original: tuple[int, int]
) -> dict[str, Tensor]:
    """Detections in an image of `size` (height, width) -> in the `original`; empty ones dropped."""
    scale_y, scale_x = original[0] / size[0], original[1] / size[1]
    boxes = detections["boxes"]
    boxes = torch.stack(
        [
            side * scale
            for side, scale in zip(boxes.unbind(-1), (scale_x, scale_y) * 2, strict=True)
        ],
        dim=-1,
    )
    boxes = clip_boxes_to_image(boxes, original)
    keep = nonempty(boxes)
    return {k: v[keep] for k, v in (detections | {"boxes": boxes}).items()}


def build_backbone(cfg) -> nn.Module:
    """The feature extractor that MODEL.BACKBONE.NAME names."""
    check_supported(cfg)
    return BACKBONES[cfg.MODEL.BACKBONE.NAME](cfg)


def build_model(cfg) -> GeneralizedRCNN:
    """The detector on `cfg.MODEL.DEVICE`, in training mode, at its random initialisation.

    UserError where the config asks for what the native engine does not have.
    """
    backbone = build_backbone(cfg)
    model = GeneralizedRCNN(
        backbone,
        build_rpn(cfg, backbone),
        build_roi_heads(cfg, backbone),
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    model.to(cfg.MODEL.DEVICE)
    if model.device.type == "cpu":
        sync_on_cpu(model)
    return model
