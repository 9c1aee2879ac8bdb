"""Batch-norm statistics measured with the weights standing still, equal on every process."""

from collections.abc import Iterable
from itertools import islice

import torch
import torch.distributed as dist
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn


@torch.no_grad()
def precise_bn(model: nn.Module, batches: Iterable, num_iters: int) -> None:
    """Replace running means and variances by those of the population in `num_iters` batches.

    The population is every value that reaches a layer, over all batches and processes, each with
    the same weight: "Rethinking Batch in BatchNorm" (2021), section 3 and its appendix. On one
    process this is `fvcore.nn.precise_bn`, which Detectron2 uses; that one cannot merge processes.

    Args:
        model: its batch-norm layers in training mode are updated; not wrapped for data parallelism.
        batches: what `model` is called with, this process's own.
        num_iters: batches to use, the same number on every process.
    """
    layers = get_bn_modules(model)
    sums = {m: torch.zeros(2 * m.num_features + 1, dtype=torch.float64) for m in layers}

    def collect(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        sums[layer] += moments(inputs[0])

    hooks = [layer.register_forward_pre_hook(collect) for layer in sums]
    try:
        for batch in islice(batches, num_iters):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, total in sums.items():
        if dist.is_initialized():
            dist.all_reduce(total)
        if total[-1] > 0:  # else nothing has reached the layer
            mean, square = (total[:-1] / total[-1]).chunk(2)
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(square - mean**2)


def moments(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (2C + 1,): per channel the sums of x and of x^2, and the number of values.

    In float64, on the CPU: the variance of a layer can be tiny beside its squared mean.
    """
    count = x.numel() // x.shape[1]
    var, mean = torch.stack(torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)).cpu().double()
    return torch.cat([count * mean, count * (var + mean**2), mean.new_tensor([count])])
