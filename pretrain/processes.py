"""From a command to its processes: one, torchrun's, or those of the official code's flags."""

import argparse
import os
import signal
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain.errors import UserError


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `launch` reads."""
    launching = parser.add_argument_group("launch, as in the official code; or use torchrun")
    add = launching.add_argument
    add("--world-size", default=-1, type=int, help="nodes, or processes without the flag below")
    add("--rank", default=-1, type=int, help="of this node, or process")
    add("--dist-url", default=None, help="tcp://HOST:PORT, or env://")
    add("--dist-backend", default="nccl", help="on GPUs; a CPU run always uses gloo")
    add("--gpu", default=None, type=int, help="the one GPU to use")
    add("--multiprocessing-distributed", action="store_true", help="one process per GPU")


def launch(run: Callable, args) -> None:
    """Call `run(args, device)` in every process that the flags or torchrun ask for.

    - torchrun: the processes exist; the environment says who is who.
    - `--multiprocessing-distributed`: one process per GPU of this node (one on a CPU), where
      `--world-size` counts nodes and `--rank` is this node's, as in facebookresearch/moco.
    - `--world-size N --rank R`: this is process R of N.
    - otherwise a single process.

    Ctrl-C ends it with code 130 and no traceback.
    """
    try:
        _launch(run, args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _launch(run: Callable, args) -> None:
    if args.dist_url == "env://" or "TORCHELASTIC_RUN_ID" in os.environ:
        _join(run, args, "env://", _env("RANK", 0), _env("WORLD_SIZE", 1), _env("LOCAL_RANK", 0))
    elif args.multiprocessing_distributed:
        _spawn(run, args)
    elif args.world_size > 1:
        if args.rank < 0:
            raise UserError("--world-size above 1 needs --rank, this process's number")
        _join(run, args, args.dist_url, args.rank, args.world_size, args.gpu or 0)
    else:
        run(args, _device(args.gpu or 0))


def _spawn(run: Callable, args) -> None:
    local = torch.cuda.device_count() or 1
    nodes, node = max(args.world_size, 1), max(args.rank, 0)
    url = args.dist_url or f"tcp://localhost:{_free_port()}"
    context = mp.spawn(_spawned, (run, args, url, node * local, nodes * local), local, join=False)
    # The signal reaches the launcher alone; the processes that hold the state must hear of it.
    signal.signal(signal.SIGTERM, lambda *_: [p.terminate() for p in context.processes])
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as error:
        raise SystemExit(error.exit_code) from None


def _spawned(local_rank: int, run: Callable, args, url: str, first_rank: int, world: int) -> None:
    _join(run, args, url, first_rank + local_rank, world, local_rank)


def _join(run: Callable, args, url: str, rank: int, world: int, local_rank: int) -> None:
    """Become process `rank` of `world` and run."""
    if world == 1:
        return run(args, _device(local_rank))
    device = _device(local_rank)
    backend = args.dist_backend if device.type == "cuda" else "gloo"
    env = {} if url == "env://" else {"rank": rank, "world_size": world}
    dist.init_process_group(backend, init_method=url, **env)
    try:
        return run(args, device)
    finally:
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"GPU {local_rank} asked for; there are {torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _env(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def workers_per_process(workers: int) -> int:
    """A process's share of the node's data loading processes, rounded up."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return -(-workers // _env("LOCAL_WORLD_SIZE", world))


class StopRequest:
    """Remembers a SIGTERM, so that the loop can stop between two steps with everything saved."""

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_) -> None:
        self.received = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked to stop. Collective where there are several."""
        if not dist.is_initialized():
            return self.received
        flag = torch.tensor(float(self.received), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())
