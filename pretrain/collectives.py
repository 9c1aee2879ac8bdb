"""Which process this is, and what all processes hold together."""

import torch
import torch.distributed as dist

# torch 2.14 renamed it, and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenation over all processes along dimension 0; equal shapes everywhere.

    Its gradient is that of the sum of all processes' losses. DistributedDataParallel then divides
    by the number of processes, which makes it the gradient of the mean over the global batch.
    """
    return tensor if world_size() == 1 else _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        out = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
        _all_gather(out, tensor)
        return out

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]
