"""Layers that torch and torchvision lack, and what is done to the layers of a whole model.

Which device's kernels run; norms for fine-tuning, a convolution with its norm; freezing,
SyncBatchNorm on a CPU, gradients over several batches, precise batch-norm statistics.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fvcore.nn.distributed import differentiable_all_reduce
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moco_det.common.errors import UserError
from moco_det.common.gpus import has_bfloat16

# -- kernels --------------------------------------------------------------------------------------

_asked: list[str] = []  # the device types of the open `kernels_of`


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels that suit a GPU are to work on `x`, where there are two kinds."""
    return (_asked[-1] if _asked else x.device.type) == "cuda"


@contextmanager
def kernels_of(device_type: str) -> Iterator[None]:
    """While open, kernels are those of "cuda" or "cpu", whatever the tensors are on.

    Both kinds run on both, with the same numbers but for rounding: for comparison and counting.
    """
    _asked.append(device_type)
    try:
        yield
    finally:
        _asked.pop()


def half_precision(device: torch.device) -> torch.dtype:
    """bfloat16, which needs no scaling of the loss; float16 on GPUs that have no bfloat16."""
    if device.type == "cuda" and not has_bfloat16(device):
        return torch.float16
    return torch.bfloat16


# -- normalisation --------------------------------------------------------------------------------


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm whose statistics and affine parameters are constants (buffers).

    Keeps `num_batches_tracked` where it replaces a BatchNorm that had it, as Detectron2 does, so
    that the two engines' checkpoints hold the same keys.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        # The identity, exactly, before any weights are loaded.
        self.register_buffer("running_var", torch.ones(channels) - eps)
        self.register_buffer("num_batches_tracked", None)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> "FrozenBatchNorm2d":
        frozen = cls(norm.num_features, norm.eps)
        for name, tensor in norm.state_dict().items():
            setattr(frozen, name, tensor.detach())
        return frozen

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        # F.batch_norm would keep its input alive to compute the gradients of weight and bias.
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        scale, shift = (v.to(x.dtype).reshape(1, -1, 1, 1) for v in (scale, shift))
        # Not addcmul: it rounds differently, and a ReLU near 0 then takes Detectron2's other side.
        return x * scale + shift


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the union of all processes' batches, on the CPU.

    `nn.SyncBatchNorm` refuses CPU tensors, and DistributedDataParallel refuses it in CPU models;
    this is the same by two differentiable sums over the processes. Each process counts with its own
    number of values, which differ after ROI pooling and for padded images. In a single process it
    is plain BatchNorm.
    """

    @classmethod
    def from_sync_batch_norm(cls, norm: nn.SyncBatchNorm) -> "SyncBatchNorm":
        """The same layer: it takes over the parameters and buffers themselves."""
        synced = cls(norm.num_features, norm.eps, norm.momentum)
        for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
            setattr(synced, name, tensor)
        return synced

    def forward(self, x: Tensor) -> Tensor:
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if alone or not self.training:
            return super().forward(x)
        return self._normalise_union(x.float()).to(x.dtype)

    def _normalise_union(self, x: Tensor) -> Tensor:
        count = x.new_tensor([x.shape[0] * x.shape[2] * x.shape[3]])
        total = differentiable_all_reduce(torch.cat([x.sum(dim=(0, 2, 3)), count]))
        count = total[-1].detach()
        if count == 0:  # a mask head where no image has an object: no process has a region
            return x * self.weight.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)
        mean = total[:-1] / count
        # A second sum for the variance: E[x^2] - E[x]^2 would cancel in float32.
        x = x - mean.reshape(1, -1, 1, 1)
        var = differentiable_all_reduce(x.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """Detectron2's "naiveSyncBN": the statistics of all processes weigh the same.

    Mean and mean square are those of the processes' own, each over its (N, H, W), whatever their
    sizes: over images of different sizes another norm than SyncBN's, whose every value weighs the
    same. The running variance is the biased one, as in Detectron2. In a single process it is plain
    BatchNorm. A process that holds no value at all is left out (Detectron2 fails).
    """

    def forward(self, x: Tensor) -> Tensor:
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if alone or not self.training:
            return super().forward(x)
        return self._normalise_alike(x.float()).to(x.dtype)

    def _normalise_alike(self, x: Tensor) -> Tensor:
        own = [x.new_ones(1), x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))]
        if not x.numel():
            own = [x.new_zeros(1), *2 * [x.sum(dim=(0, 2, 3))]]  # zeros that pass gradients on
        total = differentiable_all_reduce(torch.cat(own))
        processes = total[0].detach()
        mean, square = (total[1:] / processes.clamp(min=1)).chunk(2)
        var = square - mean**2
        with torch.no_grad():
            momentum = self.momentum * processes.clamp(max=1)  # none where no process has a value
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var, momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


NORMS = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "naiveSyncBN": NaiveSyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": lambda channels: nn.GroupNorm(32, channels),
}


# What a NORM key of the config names, "" for none; or a function: channels -> the layer.
Norm = str | Callable[[int], nn.Module]


def get_norm(norm: Norm, channels: int) -> nn.Module | None:
    """The normalisation layer of so many channels; None for "" (Detectron2's rule)."""
    if not norm:
        return None
    if callable(norm):
        return norm(channels)
    if norm not in NORMS:
        known = ", ".join(NORMS)
        raise UserError(
            f"unknown normalisation {norm!r}; the NORM keys of MODEL take one of {known}"
        )
    return NORMS[norm](channels)


class ConvNorm(nn.Conv2d):
    """Convolution that keeps the spatial size (at stride 1), then the normalisation `norm`.

    It has a bias exactly where it has no normalisation. The normalisation is the child `norm`, so
    parameters are called as in Detectron2: `conv1.weight`, `conv1.norm.weight`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm: Norm = "",
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=groups,
            bias=not norm,
        )
        self.norm = get_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)


# -- a whole model --------------------------------------------------------------------------------


def freeze(module: nn.Module) -> None:
    """No parameter of `module` is trained any more, and no BatchNorm in it updates."""
    module.requires_grad_(False)
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    _replace(module, kinds, FrozenBatchNorm2d.from_batch_norm)


def sync_on_cpu(module: nn.Module) -> None:
    """Make every SyncBatchNorm below `module` one that works on the CPU."""
    _replace(module, nn.SyncBatchNorm, SyncBatchNorm.from_sync_batch_norm)


def _replace(module: nn.Module, kinds, convert: Callable[[nn.Module], nn.Module]) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, kinds):
                setattr(parent, name, convert(child))


def kaiming_fill(module: nn.Module) -> None:
    """Initialise a head of keypoints or surfaces: He et al. 2015, by its outputs; biases 0."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")


def accumulate_gradients(
    model: nn.Module,
    batches: Iterator,
    scaler: torch.amp.GradScaler,
    accumulation: int,
    precision: torch.dtype | None,
    before_pass: Callable[[int], None] = lambda number: None,
) -> tuple[dict[str, Tensor], float]:
    """Add to the gradients those of the mean loss over `accumulation` batches and all processes.

    Args:
        model: batch -> losses by name; perhaps wrapped for data parallelism.
        batches: this process's own.
        scaler: of the loss.
        precision: of autocast; None for no autocast.
        before_pass: called with the number of each forward pass.

    Returns:
        This process's mean losses, detached, and the seconds spent waiting for data.
    """
    device = next(model.parameters()).device.type
    passes, waited = [], 0.0
    for number in range(accumulation):
        start = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - start
        before_pass(number)
        # Only the last forward pass has to tell the other processes its sums.
        silent = isinstance(model, DistributedDataParallel) and number + 1 < accumulation
        with model.no_sync() if silent else nullcontext():
            with torch.autocast(device, precision, enabled=precision is not None):
                losses = model(batch)
                total_loss = sum(losses.values()) / accumulation
            scaler.scale(total_loss).backward()
        passes.append({name: loss.detach() for name, loss in losses.items()})
    return {k: sum(p[k] for p in passes) / accumulation for k in passes[0]}, waited


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
