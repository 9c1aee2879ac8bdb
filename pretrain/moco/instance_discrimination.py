"""The pretext task of all mechanisms: two views of an image match (arXiv:1911.05722, Sec. 3.3).

Shape legend:
    N: images of this process       B: images of all processes (the global batch)
    P: queries of this process, N of them but under multi-crop
    C: feature dimension            K: negatives of a query
    H, W: height and width of a view
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from moco_det.common.gpus import upload
from moco_det.common.processes import gather, rank, world_size
from pretrain.moco.grouped_batchnorm import group_batchnorm

PIXEL_MEAN = (123.675, 116.28, 103.53)  # ImageNet, RGB, 0..255
PIXEL_STD = (58.395, 57.12, 57.375)


def embed(
    encoder: nn.Module, images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """uint8 N x H x W x 3 -> L2-normalised features N x C, fp32; `mean` and `std`: of pixels, 3."""
    return F.normalize(encoder(standardized(images, mean, std)).float(), dim=1)


def standardized(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 N x H x W x 3 -> N x 3 x H x W, what an encoder takes."""
    pixels = images.permute(0, 3, 1, 2).float()  # a channels_last tensor without a copy
    return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)


class InstanceDiscrimination(nn.Module):
    """Encodes queries, and keys under shuffled BN. A mechanism (Fig. 2) says where keys come from.

    A mechanism's `forward(*self.inputs(...))` is one step up to the logits. It returns
        logits: P x (1+K), the positive at index 0, divided by the temperature, fp32.
        keys: B x C, the keys of all processes in the order of the global batch.
        queries: P x C, L2-normalised; the first N of them are of the images' first views.
        and a loss of its own for each of `auxiliary`, the mean over this process's queries.
    After the backward pass `enqueue(keys)` is called. All of them name their encoder `encoder_q`.

    Args:
        encoder: the network f_q, images (N, 3, H, W) -> features (N, C).
        temperature: tau of Eqn. (1).
        bn_groups: number of groups per process in which BN statistics are computed separately.
        shuffle_bn: whether keys are normalised among other companions than their queries; False is
            the ablation of A.9.
    """

    num_views = 2  # of an image in a step: the query's and the key's
    auxiliary: tuple[str, ...] = ()  # names of further losses, for the log
    plain_embed = staticmethod(embed)  # an encoder's pass, where it is not compiled

    def __init__(
        self,
        encoder: nn.Module,
        temperature: float = 0.07,
        bn_groups: int = 1,
        shuffle_bn: bool = True,
    ):
        super().__init__()
        self.temperature = temperature
        self.bn_groups = bn_groups
        self.shuffle_bn = shuffle_bn
        self.encoder_q = group_batchnorm(encoder, bn_groups)
        self.use_plain_encoders()
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD), persistent=False)

    def inputs(
        self, views: list[torch.Tensor], indices: torch.Tensor, seed: int, step: int
    ) -> tuple[torch.Tensor, ...]:
        """The arguments of `forward` in step `step`; all draws are a function of (seed, step).

        Args:
            views: `num_views` views of this process's images, uint8 RGB, N x H x W x 3; beyond
                them, under multi-crop, small ones.
            indices: the index in the data set of each image of the global batch, B.
        """
        im_q, im_k, *small = views
        order = torch.arange(len(indices))
        if self.shuffle_bn:
            order = shuffle_index(seed, step, len(indices))
        return im_q, im_k, upload(order, im_q.device), *small

    def enqueue(self, keys: torch.Tensor) -> None:
        """Keep the keys of this step (B x C) for later ones, where the mechanism has a queue."""

    def memory_fill(self, seen: int) -> dict[str, float]:
        """Under a name for the log: the share of stored keys that come from images, no longer from
        the random initialisation, after `seen` images."""
        return {}

    def encode(self, encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """uint8 N x H x W x 3 -> L2-normalised features N x C."""
        features = self.embed(encoder, images, self.pixel_mean, self.pixel_std)
        return features.clone() if self.replayed else features

    def compile_encoders(self, backend: str = "inductor", cuda_graphs: bool = False) -> None:
        """From now on `encode` runs compiled code; the first call for each encoder compiles it.

        From pixels to features it is one graph for each encoder and size of views, in which nothing
        waits for the device. Evaluation does not go through it. Parameters keep their names.

        Args:
            cuda_graphs: replay all kernels of a pass by one launch.
        """
        # DistributedDataParallel would have the graph split at its buckets, which PyTorch cannot
        # where a graph has an autograd.Function.
        torch._dynamo.config.optimize_ddp = False
        mode = "reduce-overhead" if cuda_graphs else None
        self.embed = torch.compile(
            self.plain_embed, fullgraph=True, dynamic=False, backend=backend, mode=mode
        )
        self.replayed = cuda_graphs

    def use_plain_encoders(self) -> None:
        """Undo `compile_encoders`."""
        self.embed = self.plain_embed
        self.replayed = False  # whether a later call writes over what this one returns

    def rehearse(
        self,
        images: torch.Tensor,
        dtype: torch.dtype | None = None,
        small: Sequence[torch.Tensor] = (),
    ) -> None:
        """Encode as in a step, forward and backward, and leave everything as it was: what is to be
        compiled is compiled now, or fails now. Not collective.

        Args:
            images: a view of this process's images, uint8, N x H x W x 3.
            dtype: of mixed precision; None for float32.
            small: multi-crop's small views of the same images.
        """
        kind = images.device.type
        passes = [(encoder, images) for encoder in self.children()]
        passes += [(self.encoder_q, image_major(small))] if small else []
        buffers = [value for encoder in self.children() for value in encoder.buffers()]
        before = [value.clone() for value in buffers]
        gradients = [value.grad for value in self.parameters()]
        try:
            for encoder, pixels in passes:
                trained = any(p.requires_grad for p in encoder.parameters())
                with (
                    torch.set_grad_enabled(trained),
                    torch.autocast(kind, dtype, enabled=dtype is not None),
                ):
                    features = self.encode(encoder, pixels)
                if trained:
                    features.sum().backward()
        finally:
            for value, gradient in zip(self.parameters(), gradients, strict=True):
                value.grad = gradient
            for value, earlier in zip(buffers, before, strict=True):
                value.copy_(earlier)

    def encode_shuffled(
        self, encoder: nn.Module, im_k: torch.Tensor, order: torch.Tensor
    ) -> torch.Tensor:
        """Keys of the global batch, each normalised in a group of random companions.

        Sec. 3.3, "Shuffling BN": a query and its key must not share batch statistics.

        Args:
            im_k: the key views of this process's images, uint8, N x H x W x 3.
            order: the shuffle, a permutation of range(B) that is the same on every process.
        Returns:
            keys: B x C, in the order of the images, on every process.
        """
        # All processes' images are put in the shuffled order; this process encodes its share of it,
        # in BN groups of consecutive images. The images travel as uint8, a quarter of float32.
        mine = order.chunk(world_size())[rank()]  # N indices of the global batch
        shuffled = self.encode(encoder, gather(im_k)[mine])  # N x C
        # One gather serves both to undo the shuffle and to give every process all keys.
        shuffled = gather(shuffled)  # B x C; row i is the key of image order[i]
        keys = torch.empty_like(shuffled)
        keys[order] = shuffled
        return keys


def image_major(views: Sequence[torch.Tensor]) -> torch.Tensor:
    """V views N x H x W x 3 -> NV x H x W x 3: all views of the first image, then of the second.

    So a BN group, which is a number of consecutive views, has the views of the images that are one
    in the other passes too, however the groups are spread over processes.
    """
    return torch.stack(tuple(views), dim=1).flatten(0, 1)


def shuffle_index(seed: int, step: int, batch_size: int) -> torch.Tensor:
    """The key permutation of `step`: a function of (seed, step) alone, equal on all processes."""
    return torch.randperm(batch_size, generator=step_generator(seed, step))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of what all processes draw alike in `step`."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
