"""FCN-16s for semantic segmentation (MoCo, arXiv:1911.05722, appendix A.5).

    images -> ResNet with dilated res5 -> (N, C, H / 16, W / 16) -> FCN16Head -> a class per pixel

Behaviour and parameter names are those of Detectron2's SemanticSegmentor, with the plugin's head.
Legend: K classes; a label map is (H, W) int64 with `ignore_value` where a pixel has no class.
"""

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from moco_det.common.errors import UserError
from moco_det.config.checks import semantic_feature
from moco_det.native.modeling.batching import batch_images, batch_labels
from moco_det.native.modeling.layers import ConvNorm


class FCN16Head(nn.Module):
    """Two 3x3 convolutions of dilation 6 with norm and ReLU, a 1x1 classifier, upsampling.

    Args:
        in_feature: name of the feature map to work on.
        in_channels: its width.
        stride: of that map; 16 in the paper.
        num_classes: K.
        channels: width of the 3x3 convolutions; 256 in the paper.
        norm: their normalisation, "" for none.
        ignore_value: label of the pixels that take no part in the loss.
        loss_weight: factor of the loss.
    """

    def __init__(
        self,
        in_feature: str,
        in_channels: int,
        stride: int,
        num_classes: int,
        channels: int = 256,
        norm: str = "SyncBN",
        ignore_value: int = 255,
        loss_weight: float = 1.0,
    ):
        super().__init__()
        self.in_feature = in_feature
        self.stride = stride
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.conv1 = ConvNorm(in_channels, channels, 3, norm, dilation=6)
        self.conv2 = ConvNorm(channels, channels, 3, norm, dilation=6)
        self.predictor = nn.Conv2d(channels, num_classes, 1)
        c2_msra_fill(self.conv1)
        c2_msra_fill(self.conv2)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Feature maps -> logits (N, K, stride * h, stride * w) for the map's (h, w).

        In float32 or finer. That is at least the size of the images, and lies on their pixels.
        """
        x = F.relu_(self.conv1(features[self.in_feature]))
        x = self.predictor(F.relu_(self.conv2(x)))
        # Half precision ends here: it is too coarse to interpolate and to sum over pixels in.
        return upsample(x.to(torch.promote_types(x.dtype, torch.float32)), self.stride)

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Logits (N, K, H, W) or larger, and label maps (N, H, W) -> {"loss_sem_seg": mean}."""
        logits = logits[..., : labels.shape[-2], : labels.shape[-1]]
        loss = pixel_cross_entropy(logits, labels, self.ignore_value)
        return {"loss_sem_seg": loss * self.loss_weight}


def upsample(x: Tensor, stride: int) -> Tensor:
    """Bilinear upsampling (N, K, h, w) -> (N, K, stride * h, stride * w).

    Every layer of a ResNet that has a stride is centred on its first pixel (an odd kernel, padded
    by half of it), so that value i of the map lies on pixel stride * i, whatever the image's size.
    The literature's crops, 513 = 32 * 16 + 1 and 769 = 48 * 16 + 1, are those whose last pixel has
    a value of its own. Interpolating between corners puts value i there and nowhere else. Beyond
    the last value, its copy stands for the pixels up to where the next would be.
    """
    height, width = (side * stride + 1 for side in x.shape[-2:])
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)
    return x[..., :-1, :-1]


def pixel_cross_entropy(logits: Tensor, labels: Tensor, ignore_value: int) -> Tensor:
    """Mean over the pixels with a label; 0, with a gradient of 0, where there are none.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W).
    """
    total = F.cross_entropy(logits, labels, ignore_index=ignore_value, reduction="sum")
    return total / (labels != ignore_value).sum().clamp(min=1)


class SemanticSegmentor(nn.Module):
    """A backbone and a head that gives every pixel a score for every class.

    Args:
        backbone: images -> {name: feature map}, with the attribute `size_divisibility`.
        sem_seg_head: an `FCN16Head`.
        pixel_mean, pixel_std: per channel, in the input's channel order and 0-255 scale.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sem_seg_head: nn.Module,
        pixel_mean: list[float],
        pixel_std: list[float],
    ):
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
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
                order of INPUT.FORMAT, on any device. In training also "sem_seg", its label map. In
                inference optionally "height" and "width" of the original image.

        Returns:
            In training the loss "loss_sem_seg". In inference one dict per image: "sem_seg"
            (K, height, width), logits at the size of the original (of the input, without "height"
            and "width"), on the model's device.
        """
        if not self.training:
            return self.segment(batch)
        images, _ = self.preprocess([x["image"] for x in batch])
        size, ignored = images.shape[-2:], self.sem_seg_head.ignore_value
        labels = batch_labels([x["sem_seg"] for x in batch], size, ignored, self.device)
        return self.sem_seg_head.losses(self.sem_seg_head(self.backbone(images)), labels)

    @torch.no_grad()
    def segment(self, batch: list[dict]) -> list[dict[str, Tensor]]:
        images, sizes = self.preprocess([x["image"] for x in batch])
        logits = self.sem_seg_head(self.backbone(images))
        return [
            {"sem_seg": resize(one, size, (x.get("height", size[0]), x.get("width", size[1])))}
            for one, size, x in zip(logits, sizes, batch, strict=True)
        ]

    def preprocess(self, images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """See `batch_images`."""
        multiple = self.backbone.size_divisibility
        return batch_images(images, self.pixel_mean, self.pixel_std, multiple)


def resize(logits: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Logits (K, H, W) of a padded image -> (K, *original) of the image of `size` in it."""
    logits = logits[:, : size[0], : size[1]]
    if tuple(original) == tuple(size):
        return logits
    # Here pixels are areas, as in the resizing that made the input of the original.
    return F.interpolate(logits[None], size=original, mode="bilinear", align_corners=False)[0]


def build_semantic_segmentor(cfg, backbone: nn.Module) -> SemanticSegmentor:
    """
    Args:
        backbone: with the attributes `channels` and `strides` by feature name.

    Raises:
        UserError: the config asks for another head, or the backbone has not what the head needs.
    """
    head = cfg.MODEL.SEM_SEG_HEAD
    if head.NAME != "FCN16Head":
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.NAME is {head.NAME}: the native engine has FCN16Head only"
        )
    in_feature = semantic_feature(cfg, backbone.strides)
    return SemanticSegmentor(
        backbone,
        FCN16Head(
            in_feature,
            backbone.channels[in_feature],
            backbone.strides[in_feature],
            head.NUM_CLASSES,
            head.CONVS_DIM,
            head.NORM,
            head.IGNORE_VALUE,
            head.LOSS_WEIGHT,
        ),
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
