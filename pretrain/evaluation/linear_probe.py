"""A linear classifier on frozen features: the protocol of Section 4.1 (arXiv:1911.05722)."""

import copy
from pathlib import Path

import torch
from torch import nn

from moco_det.common.errors import UserError
from pretrain.evaluation.classification import ClassifierTraining
from pretrain.evaluation.features import pooled


class LinearProbe(ClassifierTraining):
    """Steps see features of augmented or of cached images; the backbone must not change."""

    name = "the linear protocol"

    def prepare_encoder(self) -> None:
        nn.init.normal_(self.encoder.fc.weight, std=0.01)  # as in the official code
        nn.init.zeros_(self.encoder.fc.bias)
        self.encoder.fc.requires_grad_(True)

    def prepare_training(self) -> nn.Module:
        self.frozen = frozen_state(self.encoder)
        backbone = pooled(self.encoder)  # shares the encoder's weights
        self.val = self.data.validation(backbone)
        self.data.prepare_training(backbone)
        return self.encoder.fc

    def validation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Computed once, as the backbone does not change."""
        if self.args.evaluate:
            return self.data.validation(pooled(self.encoder))
        return self.val

    def check(self) -> None:
        check_frozen(self.encoder, self.frozen)

    def load(self, state: dict, path: Path) -> None:
        before = frozen_state(self.encoder)
        super().load(state, path)
        if self.args.pretrained and changed(self.encoder, before):
            source = self.args.pretrained
            raise UserError(f"{path} is of another backbone than --pretrained {source}")


def frozen_state(encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all that must not change: weights and batch statistics below the classifier."""
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith("fc.")}
    return copy.deepcopy(state)


def changed(encoder: torch.nn.Module, frozen: dict[str, torch.Tensor]) -> list[str]:
    """The names of what differs from `frozen`, in any bit."""
    state = encoder.state_dict()
    return [name for name, value in frozen.items() if not torch.equal(state[name], value)]


def check_frozen(encoder: torch.nn.Module, frozen: dict[str, torch.Tensor]) -> None:
    """The official code's sanity check. Raises RuntimeError: accuracies would mean nothing."""
    names = changed(encoder, frozen)
    if names:
        raise RuntimeError(f"the frozen backbone changed in training: {names[0]}")
