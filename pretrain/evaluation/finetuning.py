"""End-to-end fine-tuning for classification (arXiv:1911.05722, A.6 and A.7)."""

import torch
import torch.distributed as dist
from torch import nn

from moco_det.common.errors import UserError
from moco_det.common.processes import world_size
from pretrain.engine.optimization import AMP_DTYPES
from pretrain.evaluation.classification import ClassifierTraining
from pretrain.evaluation.features import encode, pooled
from pretrain.moco.grouped_batchnorm import choose_bn_groups, group_batchnorm

# The papers' values where they give one (lr of A.7, steps of A.6); "the typical ResNet
# implementation in PyTorch" has momentum 0.9 and weight decay 1e-4 on all parameters.
DEFAULTS = {
    "lr": 0.03,
    "schedule": [70, 90],
    "weight_decay": 1e-4,
    "output": "output/finetune",
}


class FineTuning(ClassifierTraining):
    """Steps see augmented images, and gradients reach all weights.

    Batch statistics are those of BN groups, as in pretraining: about 32 images each whatever the
    launch, as on the 8 GPUs of a batch of 256. Running statistics are those of the first group.
    """

    name = "fine-tuning"

    def prepare_encoder(self) -> None:
        """The classifier keeps torchvision's initialisation, as the typical implementation does."""
        args = self.args
        self.encoder.requires_grad_(True)
        try:
            groups = choose_bn_groups(args.batch_size, world_size(), args.bn_groups, shuffled=False)
        except ValueError as error:
            raise UserError(str(error)) from error
        group_batchnorm(self.encoder, groups)

    def prepare_training(self) -> nn.Module:
        self.data.prepare_training(None)
        return ImageClassifier(self.encoder, AMP_DTYPES[self.args.amp])

    def train_epoch(self, epoch: int) -> None:
        self.encoder.train()
        super().train_epoch(epoch)

    def validation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """With the weights as they are now, and the main process's running statistics."""
        self.encoder.eval()
        if world_size() > 1:
            for buffer in self.encoder.buffers():
                dist.broadcast(buffer, 0)
        return self.data.validation(pooled(self.encoder))


class ImageClassifier(nn.Module):
    """uint8 N x S x S x 3 -> logits N x C, fp32; `dtype` is that of mixed precision, if any."""

    def __init__(self, encoder: nn.Module, dtype: torch.dtype | None = None):
        super().__init__()
        self.encoder = encoder
        self.dtype = dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return encode(self.encoder, images, self.dtype)
