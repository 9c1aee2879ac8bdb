"""BatchNorm over groups of a batch, so that one process can do what several GPUs do."""

import torch
import torch.nn.functional as F
from torch import nn


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that normalises each of `groups` equal, consecutive parts of the batch by itself.

    In the paper a group is what one GPU holds; here G groups in one process give the statistics of
    G processes. Running statistics follow the first group alone: the official code, with one group
    a process, ends with those of process 0, whose buffers DistributedDataParallel broadcasts.
    """

    groups = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C, H, W); in training N must be a multiple of `groups`."""
        if not self.training or self.groups == 1:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        running = [(self.running_mean, self.running_var)] + [(None, None)] * (self.groups - 1)
        parts = [
            F.batch_norm(part, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
            for part, (mean, var) in zip(x.chunk(self.groups), running, strict=True)
        ]
        return torch.cat(parts)


def group_batchnorm(model: nn.Module, groups: int) -> nn.Module:
    """Make every BatchNorm2d of `model` normalise by `groups` groups, in place; keys are kept."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = GroupedBatchNorm2d
            layer.groups = groups
    return model
