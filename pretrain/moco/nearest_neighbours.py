"""kNN-MoCo: an image's neighbours are positives too (arXiv:2106.05967, Sec. 4.3, Algorithm 1).

Shape legend:
    N: images of this process       B: images of all processes (the global batch)
    P: queries of this process, N of large views and N of each small one
    C: feature dimension            K: length of the queues
    D: pooled features of the backbone, in front of the head
    k: neighbours of a query
"""

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.moco.instance_discrimination import standardized
from pretrain.moco.momentum_contrast import MoCo


def embed_with_backbone(
    encoder: nn.Module, images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """uint8 N x H x W x 3 -> N x (C+D), fp32: what `embed` gives and, L2-normalised as well, what
    the backbone gives. The latter only says which neighbours are near: no gradient goes through it.
    """
    projected, features = encoder(standardized(images, mean, std))
    features = features.detach()
    return torch.cat([F.normalize(x.float(), dim=1) for x in (projected, features)], dim=1)


def with_input(head: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor):
    """A hook by which an encoder, whose last module is its head, returns the head's input too:
    it then gives a pair, N x C and N x D."""
    return output, inputs[0]


class NearestNeighbourMoCo(MoCo):
    """MoCo that also draws each query to its k nearest neighbours among the queue's images.

    A second queue Q_g, aligned with the first one Q_h, has the backbone's features of the same
    keys. The nearest columns to a query are found in Q_g, by cosine, and are positives in Q_h:

        L_nn = - 1/k sum over the neighbours j of log softmax_j(q . Q_h / tau)

    over the K columns of the queue, neighbours included; the query's own key is not among them, as
    in Algorithm 1. The loss to be minimised is L_inst + lambda L_nn.

    The authors' code writes a step's keys into Q_g before it searches there, and compares with Q_h
    as it was, so that those columns of the two are not of the same images. Here both are as the
    steps before left them.

    `queue_backbone` is named as theirs, whose checkpoints can be exchanged. It takes D K x 4 bytes
    on every process and in every checkpoint: 512 MB for a ResNet-50 and 65536 keys.

    Args:
        encoder: as for MoCo; `encoder.fc` is its head, the last module, and begins with a Linear.
        neighbours: k, at most `queue_size`.
        dim, queue_size, momentum, temperature, bn_groups, shuffle_bn: see MoCo.
    """

    auxiliary = ("loss_nn",)
    plain_embed = staticmethod(embed_with_backbone)

    def __init__(
        self,
        encoder: nn.Module,
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        bn_groups: int = 1,
        shuffle_bn: bool = True,
        neighbours: int = 20,
    ):
        super().__init__(encoder, dim, queue_size, momentum, temperature, bn_groups, shuffle_bn)
        self.neighbours = neighbours
        first = next(layer for layer in encoder.fc.modules() if isinstance(layer, nn.Linear))
        self.widths = dim, first.in_features  # C, D
        queue = F.normalize(torch.randn(first.in_features, queue_size), dim=0)
        self.register_buffer("queue_backbone", queue)  # D x K
        for network in (self.encoder_q, self.encoder_k):
            network.fc.register_forward_hook(with_input)

    def forward(
        self, im_q: torch.Tensor, im_k: torch.Tensor, order: torch.Tensor, *small: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step up to the logits; call `enqueue(keys)` after the backward pass.

        Args:
            im_q, im_k, order, small: see MoCo.
        Returns:
            logits: P x (1+K), the positive at index 0, divided by the temperature.
            keys: B x (C+D), of head and backbone, of all processes.
            queries: P x C, L2-normalised.
            loss_nn: the mean over the queries.
        """
        both, keys = self.encode_both(im_q, im_k, order, *small)  # P x (C+D), B x (C+D)
        q, features = both.split(self.widths, dim=1)
        logits = self.contrast(q, keys[:, : self.widths[0]])

        with torch.autocast(q.device.type, enabled=False):
            similarity = features @ self.queue_backbone  # P x K
            nearest = similarity.topk(self.neighbours, dim=1, sorted=False).indices  # P x k
        return logits, keys, q, neighbour_loss(logits[:, 1:], nearest)

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Replace the oldest keys in both queues by `keys` (B x (C+D))."""
        projected, features = keys.split(self.widths, dim=1)
        self.replace_oldest(self.queue_backbone, features)
        super().enqueue(projected)


def neighbour_loss(logits: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with k equally likely classes each; the mean over the queries.

    Args:
        logits: P x K, of the queue, divided by the temperature.
        nearest: the columns of each query's neighbours, P x k.
    """
    # log-softmax at these columns, without a matrix P x K of all of them.
    return (logits.logsumexp(dim=1) - logits.gather(1, nearest).mean(dim=1)).mean()
