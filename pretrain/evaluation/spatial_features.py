"""The feature maps of a ResNet's third or fourth stage at a finer stride than it was trained with.

A ResNet's stages have strides 4, 8, 16 and 32 towards the image. Dense evaluations want more places
than the last one has, and take the stride of 2 out of stages 3 and 4:

    label propagation (STC's public code)        stage 3 ("res4"), stride 8, nothing dilated
    segment retrieval (the authors' public code) stage 4 ("res5"), stride 8, dilated by 2 and 4

Shape legend:
    N: images     D: channels of the stage     H, W: the map's sides, an eighth of the image's
"""

import copy

import torch
from torch import nn

from moco_det.common.errors import UserError
from pretrain.evaluation.features import extract

STAGES = ("layer1", "layer2", "layer3", "layer4")
STRIDED = ("layer3", "layer4")  # these lose their stride


class SpatialFeatures(nn.Module):
    """Images N x 3 x S x S -> feature maps N x D x H x W; the encoder itself stays as it is.

    Args:
        encoder: a ResNet of torchvision's form.
        last: the stage whose output it is.
        dilated: widen the 3x3 convolutions behind a removed stride, so that each still sees what
            it was trained to see: by 2 in stage 3 and by 4 in stage 4. Without, their stride is 1
            and all else as it was.

    Raises:
        UserError: the encoder has no such stages.
    """

    def __init__(self, encoder: nn.Module, last: str, dilated: bool):
        super().__init__()
        if not all(hasattr(encoder, name) for name in ("conv1", *STAGES)):
            raise UserError(
                f"{type(encoder).__name__} is no ResNet: its feature maps have no stages "
                f"{STAGES[0]} to {STAGES[-1]}; pass a ResNet as -a"
            )
        stages = STAGES[: STAGES.index(last) + 1]
        stem = (encoder.conv1, encoder.bn1, encoder.relu, encoder.maxpool)
        self.stem = copy.deepcopy(nn.Sequential(*stem))
        self.stages = nn.Sequential(*(copy.deepcopy(getattr(encoder, name)) for name in stages))
        dilation = 1
        for name, stage in zip(stages, self.stages, strict=True):
            if name in STRIDED:
                before, dilation = dilation, dilation * 2 if dilated else 1
                _remove_stride(stage, before, dilation)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.stages(self.stem(images))


def _remove_stride(stage: nn.Module, first: int, others: int) -> None:
    """Stride 1 throughout; the 3x3 convolution that had the stride is dilated by `first`."""
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            dilation = first if module.stride[0] > 1 else others
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)


def unit_features(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """uint8 N x S x S x 3 -> N x D x H x W, of length 1 at each place, fp32."""
    return nn.functional.normalize(extract(backbone, images), dim=1)
