"""Start the processes of a run, or join those that torchrun has started."""

import contextlib
import errno
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco_det.common import ending
from moco_det.common.errors import (
    KILLED_FOR_MEMORY,
    UserError,
    explained,
    is_lost_peer,
    print_any_name,
)
from moco_det.common.processes import STOPS, signals_handled

TIMEOUT = timedelta(minutes=30)  # evaluation on the main process may keep the others waiting
GRACE = 5.0  # seconds, for processes whose run has failed
# Python's tracker of semaphores inherits this: it would tell of what a killed process has left.
QUIET_TRACKER = "ignore:resource_tracker:UserWarning"
MOST = 1024  # processes of a machine, and machines
LONGEST_REPORT = 20_000  # characters, which a pipe takes before anyone reads it


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
        return
    _check(num_gpus, num_machines, machine_rank)
    if num_gpus * num_machines == 1:
        main(*args)
    else:
        _check_address(num_machines, machine_rank, dist_url)
        url = free_local_url() if dist_url == "auto" else dist_url
        spawn(main, args, num_gpus, machine_rank * num_gpus, num_machines * num_gpus, url)


def _check(num_gpus: int, num_machines: int, machine_rank: int) -> None:
    for flag, number in (("--num-gpus", num_gpus), ("--num-machines", num_machines)):
        if number > MOST:
            raise UserError(f"{flag} {number}: at most {MOST:,} are supported")
    if num_gpus < 1 or not 0 <= machine_rank < num_machines:
        raise UserError(
            f"--num-gpus {num_gpus} --num-machines {num_machines} --machine-rank {machine_rank}: "
            "use at least one process per machine and ranks from 0 to machines - 1"
        )
    if torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus {num_gpus}: only {torch.cuda.device_count()} are visible")


def _check_address(num_machines: int, machine_rank: int, dist_url: str) -> None:
    if num_machines > 1 and dist_url == "auto":
        raise UserError("several machines need --dist-url tcp://HOST:PORT of machine 0")
    if dist_url != "auto":
        check_url(dist_url, hosted_here=machine_rank == 0)


def check_url(url: str, hosted_here: bool) -> None:
    """Raises UserError for an address that no process can be found at.

    Args:
        hosted_here: whether rank 0 is on this machine, so that the port has to be free.
    """
    if url.startswith(("file://", "env://")):
        return
    parts = re.fullmatch(r"tcp://(\[?[^/\]]+\]?):(\d+)/?", url)
    if not parts or int(parts[2]) > 65535:
        raise UserError(f"--dist-url {url}: the form is tcp://HOST:PORT")
    if hosted_here:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(parts[2])))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise UserError(f"--dist-url {url}: {error.strerror}") from error
                raise UserError(f"--dist-url {url}: port {parts[2]} is in use") from error


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

    Signals to this process reach them, because their checkpoint is what is to be saved.

    Raises:
        UserError: the first process's, or which process was killed; the others' connections only
            break because of it.
        SystemExit: the processes ended with another exit code; it is passed on.
        ProcessRaisedException: one of them has raised something else.
    """
    if QUIET_TRACKER not in sys.warnoptions:
        sys.warnoptions.append(QUIET_TRACKER)
    failures = mp.get_context("spawn").SimpleQueue()
    spawned = (main, args, processes, first_rank, world_size, url, backend, failures)
    children: list = []
    with _signals_passed_on(children) as passed:
        # Born with Ctrl-C blocked, they are not torn out of their imports; `_worker` unblocks it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            context = mp.start_processes(_worker, spawned, nprocs=processes, join=False)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        children += context.processes
        for signum in passed[:1]:  # it came before they were there; twice within a second is once
            _send(children, signum)
        ends = _wait_for(children)
    told: dict[str, tuple[int, str]] = {}
    while not failures.empty():
        kind, rank, text = failures.get()
        told.setdefault(kind, (rank, text))
    _raise_failure(ends, first_rank, told, passed)


@contextlib.contextmanager
def _signals_passed_on(children: list) -> Iterator[list[int]]:
    """`kill` reaches only this process; a second one ends all at once. Yields those so far."""
    passed: list[int] = []
    since = 0.0

    def pass_on(signum, frame):
        nonlocal since
        now = time.monotonic()
        if passed and now - since > ending.AGAIN:
            ending.end_now(128 + signum, f"ended at once by a second {STOPS[signum][0]}")
        since = since or now
        passed.append(signum)
        _send(children, signum)

    with signals_handled(pass_on, *STOPS):
        yield passed


def _send(children: list, signum: int) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signum)


def _wait_for(children: list) -> list[tuple[int, int]]:
    """Wait for all to end; after a failure, only `GRACE` for those that may be waiting for it.

    Returns:
        Index and exit code of each that ended by itself, in this order.
    """
    running = {child.sentinel: number for number, child in enumerate(children)}
    ends, deadline = [], None
    while running:
        # A signal may come just before the wait, which does not see it: so none is long.
        left = 1.0 if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(list(running), min(left, 1.0))
        if deadline and not ready and time.monotonic() >= deadline:
            for number in running.values():
                children[number].kill()
                children[number].join()
            break
        for number in map(running.pop, ready):
            children[number].join()
            ends.append((number, children[number].exitcode))
        # Whoever stops has saved: nobody is hurried who may be saving still.
        stopped = {0, *(code for _, code in STOPS.values())}
        if deadline is None and any(code not in stopped for _, code in ends):
            deadline = time.monotonic() + GRACE
    return ends


def _raise_failure(ends: list[tuple[int, int]], first_rank: int, told: dict, passed: list) -> None:
    """Raise what `spawn` says, causes before consequences.

    Args:
        ends: see `_wait_for`.
        told: by the processes: kind -> the first (rank, text).
        passed: the signals that were passed on.
    """
    if "unread" in told:
        sys.exit(ending.EXIT_READER_GONE)
    if "error" in told:
        raise UserError(told["error"][1])
    if "bug" in told:
        rank, text = told["bug"]
        raise mp.ProcessRaisedException(f"\n\n-- rank {rank} raised:\n{text}", rank, 0)
    killed = [(number, -code) for number, code in ends if code < 0]
    for number, signum in killed:
        if signum not in passed:
            why = f", {KILLED_FOR_MEMORY}" if signum == signal.SIGKILL else ""
            name = signal.Signals(signum).name
            raise UserError(
                f"the process of rank {first_rank + number} was killed by {name}{why}; the run's "
                "other processes have ended with it"
            )
    if killed:  # before their work has begun
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + killed[0][1])
    if "interrupted" in told:
        raise KeyboardInterrupt
    if "lost" in told:
        raise UserError(told["lost"][1])
    code = max((code for _, code in ends), default=0)
    if code:
        sys.exit(code)


def _worker(
    local_rank: int, main, args, processes, first_rank, world_size, url, backend, failures
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ending.prepare_end()
    rank = first_rank + local_rank
    with _reported(failures, rank):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if not multiprocessing.parent_process().is_alive():
            sys.exit(1)  # it would have told this process to end
        if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
        os.environ["LOCAL_WORLD_SIZE"] = str(processes)  # as torchrun does
        print_any_name()
        group = process_group(url, rank, world_size, local_rank, backend)
        with group, _reported(failures, rank):  # before the group ends, which others notice
            main(*args)


@contextlib.contextmanager
def _reported(failures, rank: int) -> Iterator[None]:
    """Leave reports to the launching process, which prints one, whoever fails."""
    try:
        yield
    except KeyboardInterrupt:
        kind, text, code = "interrupted", "", ending.EXIT_CTRL_C
    except Exception as error:
        ending.ignore_children()
        kind, text, code = "error", str(error), 1
        if isinstance(error, BrokenPipeError) and not ending.flush_output():
            kind, code = "unread", ending.EXIT_READER_GONE
        elif not isinstance(error, UserError):
            kind, text = "lost" if is_lost_peer(error) else "error", explained(error)
        if text is None:
            kind, text = "bug", traceback.format_exc()[-LONGEST_REPORT:]
    else:
        return
    failures.put((kind, rank, text))
    ending.note_failure(code)
    sys.exit(code)


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
    except BaseException:
        # It may wait for a process that is no more.
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        closing.start()
        closing.join(GRACE)
        raise
    dist.destroy_process_group()
