"""Which process of a run this is, what the processes exchange, and a request to stop.

Everything works in a single process without a process group, too.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

# torch 2.14 renamed it, and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def print_on_main(text: str) -> None:
    """Print a line, once per run."""
    if is_main():
        print(text, flush=True)


def workers_per_process(workers: int) -> int:
    """A process's share of this node's data loading processes, rounded up."""
    return -(-workers // int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))


# -- exchange -------------------------------------------------------------------------------------


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


def gather_rows(row: list[float]) -> torch.Tensor:
    """Every process gives a row of equal length; each gets all of them, (world_size, len(row)).

    The row travels as a CPU tensor, so that no device has to be waited for.
    """
    mine = torch.tensor(row, dtype=torch.float64)
    if world_size() == 1:
        return mine[None]
    rows = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows)


def gather_objects(item) -> list:
    """The items of all processes by rank, on the main process; an empty list elsewhere."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size() if is_main() else None
    dist.gather_object(item, items)
    return items or []


def all_objects(item) -> list:
    """The items of all processes by rank, on every process."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def from_main(item):
    """The main process's item, on every process."""
    if world_size() == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box)
    return box[0]


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Give every process the main process's buffers, such as running statistics."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def synchronize() -> None:
    """Wait for every process."""
    gather_rows([0.0])


# -- a request to stop ----------------------------------------------------------------------------


@contextlib.contextmanager
def signals_handled(handler: Callable, *numbers: int) -> Iterator[None]:
    """While open, `handler` takes these signals; for the main thread."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


class StopRequest:
    """While open, SIGTERM is noted instead of ending the process.

    A loop asks between two steps, and stops there with everything saved.
    """

    received = False

    def __enter__(self) -> "StopRequest":
        # Python lets only the main thread handle signals; elsewhere SIGTERM keeps its meaning.
        self._restore: Callable | int | None = None
        if threading.current_thread() is threading.main_thread():
            self._restore = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception) -> None:
        if self._restore is not None:
            signal.signal(signal.SIGTERM, self._restore)

    def _note(self, signum, frame) -> None:
        self.received = True

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Collective where there are several."""
        return bool(gather_rows([float(self.received)]).any())
