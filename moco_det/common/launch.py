"""Start the processes of a run, or join those that torchrun has started."""

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco_det.common.errors import UserError, print_any_name
from moco_det.common.processes import signals_handled

TIMEOUT = timedelta(minutes=30)  # evaluation on the main process may keep the others waiting


def launch(
    main: Callable,
    num_gpus: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
) -> None:
    """Call `main(*args)` in every process of the run, by Detectron2's flags.

    Args:
        main: a module-level function (the processes are spawned).
        num_gpus: processes on this machine; without CUDA they are CPU processes.
        num_machines, machine_rank: number of machines, and the number of this one.
        dist_url: "tcp://HOST:PORT" of the first machine; "auto" picks a free local port.

    Under torchrun the launch's own numbers count, and this only joins the process group.

    Raises:
        UserError: an impossible launch, or the first process's `UserError`.
        SystemExit: a process ended with another exit code; it is passed on.
    """
    if torchrun_started_this():
        with process_group("env://", *torchrun_ranks()):
            main(*args)
    elif num_gpus * num_machines == 1:
        main(*args)
    else:
        _check(num_gpus, num_machines, machine_rank, dist_url)
        url = free_local_url() if dist_url == "auto" else dist_url
        spawn(main, args, num_gpus, machine_rank * num_gpus, num_machines * num_gpus, url)


def _check(num_gpus: int, num_machines: int, machine_rank: int, dist_url: str) -> None:
    if num_gpus < 1 or not 0 <= machine_rank < num_machines:
        raise UserError(
            f"--num-gpus {num_gpus} --num-machines {num_machines} --machine-rank {machine_rank}: "
            "use at least one process per machine and ranks from 0 to machines - 1"
        )
    if torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus {num_gpus}: only {torch.cuda.device_count()} are visible")
    if num_machines > 1 and dist_url == "auto":
        raise UserError("several machines need --dist-url tcp://HOST:PORT of machine 0")


def torchrun_started_this() -> bool:
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def torchrun_ranks() -> tuple[int, int, int]:
    """(rank, world size, local rank) of the environment; those of a single process where absent."""
    return (
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
        int(os.environ.get("LOCAL_RANK", 0)),
    )


def free_local_url() -> str:
    """The tcp:// address of a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def spawn(
    main: Callable,
    args: tuple,
    processes: int,
    first_rank: int,
    world_size: int,
    url: str,
    backend: str | None = "nccl",
) -> None:
    """Call `main(*args)` in `processes` new processes of this machine, in one process group.

    Args:
        first_rank, world_size: the rank of the first of them, and the processes of all machines.
        backend: see `process_group`.

    Raises:
        UserError: the first process's; the others' connections only break because of it.
        SystemExit: a process ended with another exit code; it is passed on.
    """
    failures = mp.get_context("spawn").SimpleQueue()
    spawned = (main, args, processes, first_rank, world_size, url, backend, failures)
    # It would announce, after the first process that fails, the end of each of the others.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    context = mp.start_processes(_worker, spawned, nprocs=processes, join=False)
    with _sigterm_passed_on(context.pids()):
        try:
            while not context.join():
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            if not failures.empty():
                raise UserError(failures.get()) from None
            if getattr(error, "exit_code", 0) > 0:
                sys.exit(error.exit_code)
            raise


@contextlib.contextmanager
def _sigterm_passed_on(pids: list[int]) -> Iterator[None]:
    """`kill` reaches only this process; the checkpoint is written by its children."""

    def pass_on(signum, frame):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    with signals_handled(pass_on, signal.SIGTERM):
        yield


def _worker(
    local_rank: int, main, args, processes, first_rank, world_size, url, backend, failures
) -> None:
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)  # as torchrun does
    print_any_name()
    with process_group(url, first_rank + local_rank, world_size, local_rank, backend):
        try:
            main(*args)
        except UserError as error:  # reported once, by the launching process, whoever raises
            failures.put(str(error))
            sys.exit(1)


@contextlib.contextmanager
def process_group(
    url: str, rank: int, world_size: int, local_rank: int, backend: str | None = "nccl"
) -> Iterator[None]:
    """While open, this process is number `rank` of `world_size`; its GPU is the `local_rank`-th.

    `backend`: for CUDA tensors; CPU tensors always use gloo. None: the run takes no GPU, so that
    there may be more processes than GPUs.
    """
    on_gpu = backend is not None and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        backend=f"cpu:gloo,cuda:{backend}" if on_gpu else "gloo",
        init_method=url,
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
