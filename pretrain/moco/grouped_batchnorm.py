"""BatchNorm over groups of a batch, so that one process can do what several GPUs do."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from moco_det.common.errors import UserError

PIXELS = (1, 3, 4)  # of G x n x C x H x W: what a group's statistics are over


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that normalises each of `groups` equal chunks of the batch by itself.

    Chunks are consecutive images. In the paper a group is what one GPU holds; here G groups in one
    process give the statistics of G processes. Running statistics follow the first group alone: the
    official code, with one group a process, ends with those of process 0, whose buffers
    DistributedDataParallel broadcasts.

    Two ways lead to the same numbers: PyTorch's kernel for each chunk in turn, and, under
    `torch.compile`, tensor code over all groups at once, which the compiler fuses with the ReLU and
    the residual sum that follow. By itself that code would be slow.
    """

    groups = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C, H, W); in training N must be a multiple of `groups`."""
        if not self.training:
            return super().forward(x)
        if torch.compiler.is_compiling():
            return self.at_once(x)
        return super().forward(x) if self.groups == 1 else self.in_turn(x)

    def in_turn(self, x: torch.Tensor) -> torch.Tensor:
        """Each chunk by PyTorch's own kernel, and a copy of all to put them together."""
        self.num_batches_tracked.add_(1)
        running = [(self.running_mean, self.running_var)] + [(None, None)] * (self.groups - 1)
        normalised = [
            F.batch_norm(group, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
            for group, (mean, var) in zip(x.chunk(self.groups), running, strict=True)
        ]
        return torch.cat(normalised)

    def at_once(self, x: torch.Tensor) -> torch.Tensor:
        """All groups in one pass for the statistics and one for the result."""
        out, mean, var = _NormalizeGroups.apply(x, self.weight, self.bias, self.groups, self.eps)
        count = x.numel() // self.groups // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean[0].flatten(), self.momentum)
            self.running_var.lerp_(var[0].flatten() * (count / (count - 1)), self.momentum)
        return out


class _NormalizeGroups(torch.autograd.Function):
    """Batch normalisation of G groups, forward and backward in closed form (arXiv:1502.03167).

    Autograd would sum the gradients of scale and shift in passes of their own, and keep float32
    copies of x. Here each direction reads the batch once to reduce it and once to map it, and keeps
    x, which the convolution before has written in any case.

    Statistics are G x 1 x C x 1 x 1, in float32 at least.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups: int, eps: float):
        """(N, C, H, W) -> the same, normalised; means and biased variances of all groups."""
        pixels = _by_group(x, groups)
        # Sums of squares lose their digits where a mean is far from 0; from a value of the group
        # itself it never is. Unlike var_mean's, this reduction takes no division for each element.
        origin = pixels[:, :1, :, :1, :1]
        offset = pixels - origin
        mean = offset.mean(PIXELS, keepdim=True)
        var = (offset.square().mean(PIXELS, keepdim=True) - mean.square()).clamp(min=0)
        mean = mean + origin
        inverse_std = torch.rsqrt(var + eps)
        scale = _of_images(inverse_std * weight.view(-1, 1, 1), x)
        out = (x - _of_images(mean, x)) * scale + bias.view(-1, 1, 1)
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.groups = groups
        return out.to(x.dtype), mean, var

    @staticmethod
    def backward(ctx, grad, _mean, _var):
        """With x^ = (x - mean) / std over the m pixels of a group: the gradient of x is
        weight / std * (grad - sum(grad) / m - x^ * sum(grad * x^) / m)."""
        x, weight, mean, inverse_std = ctx.saved_tensors
        count = x.numel() // ctx.groups // x.shape[1]
        grads = _by_group(grad, ctx.groups)
        grad_sum = grads.sum(PIXELS, keepdim=True)
        product_sum = (grads * (_by_group(x, ctx.groups) - mean)).sum(PIXELS, keepdim=True)
        product_sum = product_sum * inverse_std
        scale = _of_images(inverse_std * weight.view(-1, 1, 1), x)
        slope = _of_images(inverse_std * product_sum / count, x)
        grad_x = scale * (
            grad - _of_images(grad_sum / count, x) - (x - _of_images(mean, x)) * slope
        )
        return (
            grad_x.to(x.dtype),
            product_sum.sum(0).flatten(),
            grad_sum.sum(0).flatten(),
            None,
            None,
        )


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(N, C, H, W) -> (G, N/G, C, H, W) in float32 at least; of any memory format a view."""
    return x.unflatten(0, (groups, -1)).to(torch.promote_types(x.dtype, torch.float32))


def _of_images(statistic: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(G, 1, C, 1, 1) -> (N, C, 1, 1): of the group of each image of x."""
    return statistic.expand(-1, len(x) // len(statistic), -1, -1, -1).flatten(0, 1)


class GroupedForward:
    """What makes any other kind of BatchNorm, mixed into it, do the same as GroupedBatchNorm2d.

    Its own forward pass takes the groups in turn, whatever it does beside normalising (timm's
    BatchNormAct2d has the activation in it). The rows of the batch are image after image.
    """

    groups = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of any shape that the kind takes; in training N must be a multiple of `groups`."""
        if not self.training or self.groups == 1:
            return super().forward(x)
        if len(x) % self.groups:
            raise UserError(
                f"a {type(self).__name__} gets {len(x)} rows, which cannot be split into "
                f"{self.groups} BN groups of equal size"
            )
        tracked, normalised = self.track_running_stats, []
        try:
            for group in x.chunk(self.groups):
                normalised.append(super().forward(group))
                self.track_running_stats = False  # running statistics are those of the first group
        finally:
            self.track_running_stats = tracked
        return torch.cat(normalised)


@cache
def _grouped(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"Grouped{kind.__name__}", (GroupedForward, kind), {})


def group_batchnorm(model: nn.Module, groups: int) -> nn.Module:
    """Make every BatchNorm of `model` normalise by `groups` groups, in place; keys are kept."""
    for layer in batchnorms(model):
        if not isinstance(layer, (GroupedBatchNorm2d, GroupedForward)):
            plain = type(layer) is nn.BatchNorm2d and layer.affine
            plain = plain and layer.track_running_stats and layer.momentum is not None
            layer.__class__ = GroupedBatchNorm2d if plain else _grouped(type(layer))
        layer.groups = groups
    return model


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


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
