"""The memory bank: keys are drawn from stored features (arXiv:1911.05722, Fig. 2b).

Shape legend:
    N: queries of this process      B: queries of all processes (the global batch)
    C: feature dimension            K: negatives drawn in a step
    S: images of the data set       H, W: height and width of a view
"""

import torch
import torch.nn.functional as F
from torch import nn

from moco_det.common.gpus import upload
from moco_det.common.processes import gather, rank, world_size
from pretrain.moco.instance_discrimination import InstanceDiscrimination, step_generator


class MemoryBank(InstanceDiscrimination):
    """Queries against the stored features of their own image and of K others (Wu et al. 2018).

    - The positive key is the image's own row as it was left an epoch ago: keys are not encoded, so
      a step takes one view of each image, and no BN statistics can leak (Sec. 3.3).
    - "The dictionary for each mini-batch is randomly sampled from the memory bank" (Sec. 3.2): the
      K negatives are common to all queries of the global batch, drawn with replacement as Wu et al.
      do. They are drawn from the S-B other images; Wu et al. may draw a query's own row, which
      would stand both above and below in Eqn. (1).
    - The momentum is "on the representations of the same sample, not the encoder": a row becomes
      m row + (1 - m) q, L2-normalised. The paper gives no m; 0.5 is Wu et al.'s.

    The bank takes S x C x 4 bytes on every process and in every checkpoint: 656 MB for ImageNet.

    Args:
        encoder: the network f, images (N, 3, H, W) -> features (N, C).
        samples: S, above B.
        dim: C.
        negatives: K.
        momentum: m of the rows, in [0, 1).
        temperature, bn_groups: see InstanceDiscrimination.
    """

    num_views = 1

    def __init__(
        self,
        encoder: nn.Module,
        samples: int,
        dim: int = 128,
        negatives: int = 65536,
        momentum: float = 0.5,
        temperature: float = 0.07,
        bn_groups: int = 1,
    ):
        super().__init__(encoder, temperature, bn_groups, shuffle_bn=False)
        self.negatives = negatives
        self.momentum = momentum
        self.register_buffer("bank", F.normalize(torch.randn(samples, dim), dim=1))  # S x C

    def inputs(
        self, views: list[torch.Tensor], indices: torch.Tensor, seed: int, step: int
    ) -> tuple[torch.Tensor, ...]:
        (im_q,) = views
        negatives = draw_others(seed, step, self.negatives, len(self.bank), indices)
        return im_q, upload(indices, im_q.device), upload(negatives, im_q.device)

    def forward(
        self, im_q: torch.Tensor, indices: torch.Tensor, negatives: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step up to the logits, and the update of the rows.

        Args:
            im_q: views, uint8 RGB, N x H x W x 3.
            indices: the rows of the global batch's images, B.
            negatives: the rows of the dictionary, K; both the same on every process.
        Returns:
            logits: N x (1+K), the positive at index 0, divided by the temperature.
            keys: B x C, the rows of the global batch as updated.
            queries: N x C, L2-normalised.
        """
        q = self.encode(self.encoder_q, im_q)  # N x C
        rows = self.bank[indices]  # B x C, a copy: the bank may change before the backward pass
        k = rows.chunk(world_size())[rank()]  # N x C

        with torch.autocast(q.device.type, enabled=False):  # fp32: 1/tau magnifies rounding errors
            l_pos = (q * k).sum(dim=1, keepdim=True)  # N x 1
            l_neg = q @ self.bank[negatives].T  # N x K
            logits = torch.cat([l_pos, l_neg], dim=1) / self.temperature

        with torch.no_grad():
            keys = F.normalize(torch.lerp(gather(q), rows, self.momentum), dim=1)
            self.bank.index_copy_(0, indices, keys)
        return logits, keys, q

    def memory_fill(self, seen: int) -> dict[str, float]:
        return {"bank_fill": min(1.0, seen / len(self.bank))}


def draw_others(
    seed: int, step: int, count: int, samples: int, indices: torch.Tensor
) -> torch.Tensor:
    """`count` of range(samples) without `indices`, uniform with replacement; equal everywhere."""
    free = samples - len(indices)
    drawn = torch.randint(free, (count,), generator=step_generator(seed, step))
    # The n-th free number is n plus the number of taken ones up to it: the j-th taken one (from 0)
    # has taken[j] - j free ones below it.
    taken = indices.sort().values
    return drawn + torch.searchsorted(taken - torch.arange(len(taken)), drawn, right=True)
