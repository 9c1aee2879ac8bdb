"""Batch-norm statistics measured with the weights standing still, equal on every process."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from moco_det.native import comm


@torch.no_grad()
def precise_bn(model: nn.Module, batches: Iterable, num_iters: int) -> None:
    """Replace running means and variances by those of the population in `num_iters` batches.

    Every batch-norm layer in training mode is updated; `model` stays in training mode. The
    population is that of all processes together: "Rethinking Batch in BatchNorm" (2021), section 3
    and its appendix on the variance. fvcore measures each process's share; a share counts by the
    values it holds (samples times positions), and the shares are merged through their moments.

    Args:
        model: not wrapped in DistributedDataParallel.
        batches: what `model` is called with, this process's own.
        num_iters: batches to use, the same number on every process.
    """
    layers = get_bn_modules(model)
    counts = dict.fromkeys(layers, 0)

    def count(layer, inputs):
        counts[layer] += inputs[0].numel() // inputs[0].shape[1]

    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        update_bn_stats(model, batches, num_iters)
    finally:
        for hook in hooks:
            hook.remove()
    if comm.world_size() > 1:
        for layer in layers:
            _merge(layer, counts[layer])


def _merge(layer: nn.Module, count: int) -> None:
    mean, variance = layer.running_mean.double(), layer.running_var.double()
    weight = torch.tensor(float(count), dtype=torch.float64, device=mean.device)
    # (2C + 1,): the sums of x and of x^2 over this process's values, and how many there are.
    moments = torch.cat([count * mean, count * (variance + mean**2), weight[None]])
    dist.all_reduce(moments)
    total_x, total_square, total = moments[:-1].chunk(2) + (moments[-1],)
    layer.running_mean.copy_(total_x / total)
    layer.running_var.copy_(total_square / total - (total_x / total) ** 2)
