"""Contrastive losses on logits N x (1+K) whose column 0 is the positive key's."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from moco_det.common.processes import gather


class InfoNCE(nn.Module):
    """-log(exp(l_0) / sum_i exp(l_i)), Eqn. (1) of arXiv:1911.05722; mean over the queries."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        positives = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits, positives)

    @staticmethod
    def chance(negatives: int) -> float:
        """The loss where all logits are equal."""
        return math.log(negatives + 1)


class NCE(nn.Module):
    """Noise-contrastive estimation as in Wu et al. 2018 (arXiv:1805.01978, Sec. 3.2).

    Each key is classified as data or noise: h = P / (P + K P_n) with P = exp(l) / Z, the noise
    P_n = 1/S over S images, and the loss -log h(positive) - sum over negatives of log(1 - h).
    Z = S mean(exp(l)) over the negatives of the first batch, and constant from then on. In
        log P/(K P_n) = l - log K - log mean(exp(l))
    S cancels, so that the loss goes with every mechanism. It is the mean over the queries.
    """

    def __init__(self):
        super().__init__()
        # log mean(exp(l)) of the first batch; NaN before it.
        self.register_buffer("log_mean", torch.tensor(math.nan))
        # Whether it is there, without asking the device: after a state is loaded, that is asked.
        self.estimated = False
        self.register_load_state_dict_post_hook(_forget_estimated)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        negatives = logits.shape[1] - 1
        if not self.estimated:
            if self.log_mean.isnan():
                self._estimate(logits.detach()[:, 1:])
            self.estimated = True
        log_odds = logits - self.log_mean - math.log(negatives)
        data, noise = F.logsigmoid(log_odds[:, 0]), F.logsigmoid(-log_odds[:, 1:])
        return -(data + noise.sum(dim=1)).mean()

    def _estimate(self, logits: torch.Tensor) -> None:
        """From N x K negatives here, and as many on every other process. Collective."""
        local = logits.logsumexp(dim=(0, 1)) - math.log(logits.numel())
        everywhere = gather(local.view(1))
        self.log_mean.copy_(everywhere.logsumexp(dim=0) - math.log(len(everywhere)))

    @staticmethod
    def chance(negatives: int) -> float:
        """The loss where all logits are equal, h = 1 / (1 + K)."""
        return math.log(negatives + 1) + negatives * math.log1p(1 / negatives)


def _forget_estimated(loss: NCE, incompatible_keys) -> None:
    loss.estimated = False


LOSSES = {"infonce": InfoNCE, "nce": NCE}
