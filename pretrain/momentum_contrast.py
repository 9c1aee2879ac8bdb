"""Momentum Contrast: Algorithm 1 of the paper with shuffled BN (arXiv:1911.05722, Sec. 3).

Shape legend:
    N: queries of this process      B: queries of all processes (the global batch)
    C: feature dimension            K: length of the queue
    H, W: height and width of a view
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pretrain.grouped_batchnorm import group_batchnorm

PIXEL_MEAN = (123.675, 116.28, 103.53)  # ImageNet, RGB, 0..255
PIXEL_STD = (58.395, 57.12, 57.375)


class MoCo(nn.Module):
    """Query encoder, momentum key encoder and the queue of earlier keys.

    Parameter and buffer names are those of facebookresearch/moco (`encoder_q`, `encoder_k`,
    `queue`, `queue_ptr`), so that checkpoints can be exchanged.

    Args:
        encoder: the network f, images (N, 3, H, W) -> features (N, C).
        dim: C.
        queue_size: K, any size of at least one.
        momentum: m of Eqn. (2), in [0, 1).
        temperature: tau of Eqn. (1).
        bn_groups: number of groups per process in which BN statistics are computed separately.
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        bn_groups: int = 1,
    ):
        super().__init__()
        self.momentum = momentum
        self.temperature = temperature
        self.bn_groups = bn_groups
        self.encoder_q = group_batchnorm(encoder, bn_groups)
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size), dim=0))  # C x K
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD), persistent=False)

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
        with torch.no_grad():
            self.update_key_encoder()
            keys = self.encode_shuffled(im_k, order)  # B x C
        k = keys.chunk(world_size())[rank()]  # N x C

        with torch.autocast(q.device.type, enabled=False):  # fp32: 1/tau magnifies rounding errors
            l_pos = (q * k).sum(dim=1, keepdim=True)  # N x 1
            l_neg = q @ self.queue  # N x K
            logits = torch.cat([l_pos, l_neg], dim=1) / self.temperature
        return logits, keys, q

    def encode(self, encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """uint8 N x H x W x 3 -> L2-normalised features N x C."""
        pixels = images.permute(0, 3, 1, 2).float()  # a channels_last tensor without a copy
        pixels = (pixels - self.pixel_mean.view(3, 1, 1)) / self.pixel_std.view(3, 1, 1)
        return F.normalize(encoder(pixels).float(), dim=1)

    def encode_shuffled(self, im_k: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Keys of the global batch (B x C), each normalised in a group of random companions.

        Sec. 3.3, "Shuffling BN". The images travel as uint8, and the keys travel once: one gather
        serves both to undo the shuffle and to fill the queue.
        """
        mine = order.chunk(world_size())[rank()]
        shuffled = gather(self.encode(self.encoder_k, gather(im_k)[mine]))  # B x C
        keys = torch.empty_like(shuffled)
        keys[order] = shuffled
        return keys

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


def key_order(seed: int, step: int, batch_size: int) -> torch.Tensor:
    """The key permutation of `step`: a function of (seed, step) alone, equal on all processes."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return torch.randperm(batch_size, generator=generator)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenation over all processes along dimension 0, without gradient."""
    if world_size() == 1:
        return tensor
    tensor = tensor.contiguous()
    out = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(out, tensor)
    return out


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def choose_bn_groups(batch_size: int, processes: int, wanted: int | None = None) -> int:
    """Groups per process: `wanted`, or such that a group holds as nearly 32 samples as it can.

    Raises ValueError, with the reason, for a batch that cannot be split so.
    """
    if batch_size % processes:
        raise ValueError(
            f"the global batch of {batch_size} cannot be shared equally by {processes} processes"
        )
    local = batch_size // processes
    if wanted is None:
        least = 2 if processes == 1 else 1
        fitting = [g for g in range(least, local // 2 + 1) if local % g == 0]
        if not fitting:
            raise ValueError(
                f"a batch of {batch_size} on {processes} process(es) cannot be split into two or "
                "more BN groups of equal size with at least 2 samples each"
            )
        return min(fitting, key=lambda g: abs(local / g - 32))
    if wanted * processes < 2:
        raise ValueError(
            "shuffled BN needs at least two BN groups over all processes: with a single group a "
            "query and its key share their batch statistics, and the pretext task can be solved "
            "by that leak instead of by content (MoCo, Sec. 3.3); pass --bn-groups 2 or more"
        )
    if wanted < 1 or local % wanted or local // wanted < 2:
        raise ValueError(
            f"{local} samples per process cannot be split into {wanted} BN groups of equal size "
            "with at least 2 samples each"
        )
    return wanted
