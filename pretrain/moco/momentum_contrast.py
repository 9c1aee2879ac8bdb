"""Momentum Contrast: Algorithm 1 of the paper (arXiv:1911.05722, Sec. 3.2).

Shape legend:
    N: queries of this process      B: queries of all processes (the global batch)
    C: feature dimension            K: length of the queue
    H, W: height and width of a view
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from moco_det.common.processes import rank, world_size
from pretrain.moco.instance_discrimination import InstanceDiscrimination


class MoCo(InstanceDiscrimination):
    """Query encoder, momentum key encoder and the queue of earlier keys.

    Parameter and buffer names are those of facebookresearch/moco (`encoder_q`, `encoder_k`,
    `queue`, `queue_ptr`), so that checkpoints can be exchanged.

    Args:
        encoder: the network f, images (N, 3, H, W) -> features (N, C).
        dim: C.
        queue_size: K, any size of at least one.
        momentum: m of Eqn. (2), in [0, 1).
        temperature, bn_groups, shuffle_bn: see InstanceDiscrimination.
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        bn_groups: int = 1,
        shuffle_bn: bool = True,
    ):
        super().__init__(encoder, temperature, bn_groups, shuffle_bn)
        self.momentum = momentum
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size), dim=0))  # C x K
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(
        self, im_q: torch.Tensor, im_k: torch.Tensor, order: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step up to the logits; call `enqueue(keys)` after the backward pass.

        Args:
            im_q, im_k: two views of the same images, uint8 RGB, N x H x W x 3.
            order: permutation of range(B), the same on every process: the shuffle of the keys.
        Returns:
            logits: N x (1+K), the positive at index 0, divided by the temperature.
            keys: B x C, the keys of all processes in the order of the global batch.
            queries: N x C, L2-normalised.
        """
        q = self.encode(self.encoder_q, im_q)  # N x C
        with torch.no_grad():  # no gradient to keys
            self.update_key_encoder()
            keys = self.encode_shuffled(self.encoder_k, im_k, order)  # B x C
        k = keys.chunk(world_size())[rank()]  # N x C

        with torch.autocast(q.device.type, enabled=False):  # fp32: 1/tau magnifies rounding errors
            l_pos = (q * k).sum(dim=1, keepdim=True)  # N x 1
            l_neg = q @ self.queue  # N x K
            logits = torch.cat([l_pos, l_neg], dim=1) / self.temperature
        return logits, keys, q

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q, Eqn. (2), over all parameters in one call."""
        torch._foreach_lerp_(
            list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.momentum
        )

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Replace the oldest keys by `keys` (B x C); the ring has any length, also below B.

        To be called after the backward pass, which still needs the queue as the logits saw it:
        this saves the copy of the queue in every step.
        """
        size = self.queue.shape[1]
        positions = self.queue_ptr + torch.arange(len(keys), device=keys.device)
        self.queue.index_copy_(1, (positions % size)[-size:], keys[-size:].T)
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % size)

    def memory_fill(self, seen: int) -> dict[str, float]:
        return {"queue_fill": min(1.0, seen / self.queue.shape[1])}
