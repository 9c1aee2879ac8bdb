"""BatchNorm over groups of a batch, so that one process can do what several GPUs do."""

import torch
import torch.nn.functional as F
from torch import nn

from moco_det.common.errors import UserError


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that normalises each of `groups` equal chunks of the batch by itself.

    Chunks are consecutive images. In the paper a group is what one GPU holds; here G groups in one
    process give the statistics of G processes. Running statistics follow the first group alone: the
    official code, with one group a process, ends with those of process 0, whose buffers
    DistributedDataParallel broadcasts.
    """

    groups = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C, H, W); in training N must be a multiple of `groups`."""
        if not self.training or self.groups == 1:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        running = [(self.running_mean, self.running_var)] + [(None, None)] * (self.groups - 1)
        normalised = [
            F.batch_norm(group, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
            for group, (mean, var) in zip(x.chunk(self.groups), running, strict=True)
        ]
        return torch.cat(normalised)


def group_batchnorm(model: nn.Module, groups: int) -> nn.Module:
    """Make every BatchNorm2d of `model` normalise by `groups` groups, in place; keys are kept."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = GroupedBatchNorm2d
            layer.groups = groups
    return model


def choose_bn_groups(
    batch_size: int, processes: int, wanted: int | None = None, shuffled: bool = True
) -> int:
    """Groups per process: `wanted`, or such that a group holds as nearly 32 samples as it can.

    Args:
        shuffled: whether keys are to be shuffled across groups, which takes two of them at least.

    Raises UserError, with the reason, for a batch that cannot be split so.
    """
    if batch_size % processes:
        raise UserError(
            f"the global batch of {batch_size} cannot be shared equally by {processes} processes"
        )
    local = batch_size // processes
    if wanted is None:
        least = 2 if shuffled and processes == 1 else 1
        fitting = [g for g in range(least, local // 2 + 1) if local % g == 0]
        if not fitting:
            raise UserError(
                f"a batch of {batch_size} on {processes} process(es) cannot be split into two or "
                "more BN groups of equal size with at least 2 samples each"
            )
        return min(fitting, key=lambda g: abs(local / g - 32))
    if shuffled and wanted * processes < 2:
        raise UserError(
            "shuffled BN needs at least two BN groups over all processes: with a single group a "
            "query and its key share their batch statistics, and the pretext task can be solved "
            "by that leak instead of by content (MoCo, Sec. 3.3); pass --bn-groups 2 or more"
        )
    if wanted < 1 or local % wanted or local // wanted < 2:
        raise UserError(
            f"{local} samples per process cannot be split into {wanted} BN groups of equal size "
            "with at least 2 samples each"
        )
    return wanted
