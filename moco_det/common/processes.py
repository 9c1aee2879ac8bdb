"""Which process of a run this is, what the processes exchange, and a request to stop.

Everything works in a single process without a process group, too.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.multiprocessing

from moco_det.common import ending
from moco_det.common.errors import EXIT_INTERRUPTED, UserError

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


def on_main(function: Callable, *args):
    """`function(*args)` on the main process; its result, or its `UserError`, on every process."""
    result = error = None
    if is_main():
        try:
            result = function(*args)
        except UserError as raised:
            error = str(raised)
    error = from_main(error)
    if error is not None:
        raise UserError(error)
    return result


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Give every process the main process's buffers, such as running statistics."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def synchronize() -> None:
    """Wait for every process."""
    gather_rows([0.0])


# -- a request to stop ----------------------------------------------------------------------------

# Signal -> its name for the user, and the exit code once the state is saved.
STOPS = {
    signal.SIGTERM: ("SIGTERM", EXIT_INTERRUPTED),
    signal.SIGINT: ("Ctrl-C", ending.EXIT_CTRL_C),
}


@contextlib.contextmanager
def signals_handled(handler: Callable, *numbers: int) -> Iterator[None]:
    """While open, `handler` takes these signals.

    Python lets only the main thread handle signals; elsewhere they keep their meaning.
    """
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


class StopRequest:
    """While open, SIGTERM and Ctrl-C are noted instead of ending the process.

    A loop asks between two steps, and stops there with everything saved. A second signal ends the
    process at once.

    Attributes:
        received: number of the signal; 0 for none.
    """

    received = 0
    _since: float | None = None  # when this process's own first signal came

    def __enter__(self) -> "StopRequest":
        self._handled = signals_handled(self._note, *STOPS)
        self._handled.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._handled.__exit__(None, None, None)

    def _note(self, signum: int, frame) -> None:
        now = time.monotonic()
        if self._since is None:  # also where another process's was heeded already
            self._since = now
            self.received = self.received or signum
        elif now - self._since > ending.AGAIN:
            ending.end_now(128 + signum, f"ended at once by a second {STOPS[signum][0]}")

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Collective where there are several."""
        asked = int(gather_rows([float(self.received)]).max())
        if asked:  # a signal that came meanwhile is for the next time, and must not be overwritten
            self.received = asked
        return asked != 0


def end_run(signum: int, saved: str) -> None:
    """End this process; the main one has `saved` what it was asked to save by a signal. Collective.

    Raises:
        SystemExit: always.
    """
    synchronize()  # torchrun ends the others once one has ended, the one that saves among them
    name, code = STOPS[signal.Signals(signum)]
    print_on_main(f"{name}: saved {saved}")
    raise SystemExit(code)


# -- data loading processes -----------------------------------------------------------------------


def ignore_stop_signals(worker: int = 0) -> None:
    """For a loader's new worker: a signal to all processes of a run must not take its images.

    Its loop is about to save its state. The worker ends with the process that it works for, killed
    or not: see `ending.prepare_end`, which that process has to call.
    """
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)
