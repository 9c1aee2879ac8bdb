"""Processes that begin with torch imported.

`import torch` and what goes with it takes seconds, a hundred times in this suite. A server process,
Python's own "forkserver", does it once, and forks for every command that a test runs and for every
process that such a command spawns.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import context, forkserver, reduction

import torch
import torch.multiprocessing as mp

SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "torchvision", "torch.utils.tensorboard", "cv2", "fvcore.common.config", "tabulate"]
)


class Heir(context.ForkServerProcess):
    """Has its process group, environment and streams from its starter, as a real child would."""

    def __getstate__(self) -> dict:
        streams = [reduction.DupFd(number) for number in (1, 2)]
        inherited = (os.getpgrp(), server_access(), dict(os.environ), streams)
        return self.__dict__ | {"inherited": inherited}

    def run(self) -> None:
        group, server, environment, streams = self.inherited
        os.setpgid(0, group)
        become(server, environment, *(stream.detach() for stream in streams))
        CONTEXTS["spawn"] = SpawnByServer()
        multiprocessing.set_start_method("spawn", force=True)
        super().run()


class SpawnByServer(type(SERVER)):
    """A launch's and a loader's processes, forked as well; what is passed to them is pickled."""

    Process = Heir


# Name -> what `get_context` returns.
CONTEXTS = context._concrete_contexts


def server_access() -> dict[str, str | bytes]:
    """The server's address, and the key to it from Python 3.14 on."""
    forkserver.ensure_running()
    names = ("_forkserver_address", "_forkserver_authkey")
    return {name: value for name, value in vars(forkserver._forkserver).items() if name in names}


def become(server: dict, environment: dict[str, str], stdout: int, stderr: int) -> None:
    """Make a process that the server has forked have this environment and these streams.

    It goes on using the same server, as Python's documentation says; it would start another.
    """
    # The server has Ctrl-C blocked for good if it was started while a launch had.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    vars(forkserver._forkserver).update(server)
    forkserver._forkserver.ensure_running = forkserver.ensure_running = lambda: None
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for number in {stdout, stderr} - {1, 2}:
        os.close(number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))


def run_in_two_processes(function: Callable[..., None], *arguments) -> None:
    """Call `function(rank, *arguments)` as ranks 0 and 1; a module's function.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them has raised.
    """
    mp.start_processes(_one_thread, (function, *arguments), nprocs=2, start_method="forkserver")


def _one_thread(rank: int, function: Callable[..., None], *arguments) -> None:
    torch.set_num_threads(1)
    function(rank, *arguments)
