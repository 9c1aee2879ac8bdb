"""How often the host waits for the device: counted, on any machine.

A GPU works through a queue of kernels, and the host runs ahead of it: until the host has to know
what a kernel found, how many boxes are left for example. Then it waits for all that is queued, and
while it queues what comes next, the device stands idle. A small batch is as slow as these gaps.

Which operations wait is known, so that they can be counted where there is no GPU at all: the code
that a GPU would run (`kernels_of`), on the CPU.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
import torchvision
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moco_det.native.modeling.layers import kernels_of

# Operations of the dispatcher whose result, or its size, the host has to know.
WAITING = {
    "aten::_local_scalar_dense": "item",  # also int(), float(), bool(), `if tensor`
    "aten::nonzero": "nonzero",
    "aten::masked_select": "nonzero",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::bincount": "bincount",
    "aten::equal": "equal",
    "torchvision::nms": "nms",
}

# Functions that copy from the device or to it, which on a CPU need no operation. To it: from Python
# numbers, which are not in pinned memory.
COPIES = {
    Tensor.tolist: "tolist",
    Tensor.cpu: "cpu",
    torch.tensor: "upload",
    torch.as_tensor: "upload",
    Tensor.new_tensor: "upload",
}


def count_waits(step: Callable) -> Counter:
    """How often, by their kind, the host would wait for a GPU in one call of `step`."""
    counts = Counter()
    with ExitStack() as stack:
        stack.enter_context(kernels_of("cuda"))
        # torchvision's choice for as many boxes on a GPU.
        boxes = torchvision.ops.boxes
        trick = boxes._batched_nms_coordinate_trick
        stack.enter_context(mock.patch.object(boxes, "_batched_nms_vanilla", trick))
        stack.enter_context(_Operations(counts))
        stack.enter_context(_Methods(counts))
        step()
    return counts


class _Operations(TorchDispatchMode):
    """Counts what the dispatcher sees, gradients included."""

    def __init__(self, counts: Counter):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        if name in WAITING:
            self.counts[WAITING[name]] += 1
        elif name == "aten::index":
            self.counts["mask index"] += _masks(args[1])
        elif name in ("aten::index_put", "aten::index_put_"):
            # One number goes everywhere without the positions.
            self.counts["mask index"] += _masks(args[1]) if args[2].numel() != 1 else 0
        elif name == "aten::where" and any(x.ndim == 0 for x in args[1:]):
            self.counts["upload"] += 1  # of the number
        elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            self.counts["repeat_interleave"] += 1
        return function(*args, **kwargs)


def _masks(indices) -> int:
    return sum(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


class _Methods(TorchFunctionMode):
    """Counts copies to the host that reach no operation."""

    def __init__(self, counts: Counter):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in COPIES:
            self.counts[COPIES[function]] += 1
        elif function is Tensor.to and not kwargs.get("non_blocking"):
            target = kwargs.get("device", args[1] if len(args) > 1 else None)
            self.counts["to"] += isinstance(target, str | torch.device)
        return function(*args, **kwargs)
