"""Momentum Contrast: Algorithm 1 of the paper (arXiv:1911.05722, Sec. 3.2), also on small crops.

Shape legend:
    N: images of this process       B: images of all processes (the global batch)
    P: queries of this process, N of large views and N of each small one
    C: feature dimension            K: length of the queue
    H, W: height and width of a view
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from moco_det.common.processes import rank, world_size
from pretrain.moco.instance_discrimination import InstanceDiscrimination, image_major


class MoCo(InstanceDiscrimination):
    """Query encoder, momentum key encoder and the queue of earlier keys.

    Parameter and buffer names are those of facebookresearch/moco (`encoder_q`, `encoder_k`,
    `queue`, `queue_ptr`), so that checkpoints can be exchanged.

    Multi-crop ("Revisiting Contrastive Methods", arXiv:2106.05967, Sec. 4.1) adds small views of
    each image. They go through the query encoder only: each is one more query whose positive is the
    image's key, and none is ever a key. So Eqn. (1) is averaged over N (1 + views) positives. The
    running statistics of the query encoder see the large views and then the small ones.

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
        self, im_q: torch.Tensor, im_k: torch.Tensor, order: torch.Tensor, *small: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step up to the logits; call `enqueue(keys)` after the backward pass.

        Args:
            im_q, im_k: two views of the same images, uint8 RGB, N x H x W x 3.
            order: permutation of range(B), the same on every process: the shuffle of the keys.
            small: further views of them, of a size of their own.
        Returns:
            logits: P x (1+K), the positive at index 0, divided by the temperature.
            keys: B x C, the keys of all processes in the order of the global batch.
            queries: P x C, L2-normalised: N of `im_q`, then all small ones, image by image.
        """
        q, keys = self.encode_both(im_q, im_k, order, *small)
        return self.contrast(q, keys), keys, q

    def encode_both(
        self, im_q: torch.Tensor, im_k: torch.Tensor, order: torch.Tensor, *small: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries P x C, and keys B x C by the key encoder as this step updates it."""
        q = self.encode(self.encoder_q, im_q)  # N x C
        if small:
            q = torch.cat([q, self.encode(self.encoder_q, image_major(small))])  # P x C
        with torch.no_grad():  # no gradient to keys
            self.update_key_encoder()
            keys = self.encode_shuffled(self.encoder_k, im_k, order)  # B x C
        return q, keys

    def contrast(self, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Logits P x (1+K) of queries P x C against their own key, of B x C, and the queue."""
        k = keys.chunk(world_size())[rank()]  # N x C
        small = len(q) // len(k) - 1  # views of each image
        if small:
            k = torch.cat([k, k.repeat_interleave(small, dim=0)])  # P x C, as the queries stand
        with torch.autocast(q.device.type, enabled=False):  # fp32: 1/tau magnifies rounding errors
            l_pos = (q * k).sum(dim=1, keepdim=True)  # P x 1
            l_neg = q @ self.queue  # P x K
            return torch.cat([l_pos, l_neg], dim=1) / self.temperature

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
        self.replace_oldest(self.queue, keys)
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % self.queue.shape[1])

    def replace_oldest(self, queue: torch.Tensor, keys: torch.Tensor) -> None:
        """Write `keys` (B x C) over the columns of `queue` (C x K) from the pointer on."""
        size = queue.shape[1]
        positions = self.queue_ptr + torch.arange(len(keys), device=keys.device)
        queue.index_copy_(1, (positions % size)[-size:], keys[-size:].T)

    def memory_fill(self, seen: int) -> dict[str, float]:
        return {"queue_fill": min(1.0, seen / self.queue.shape[1])}
