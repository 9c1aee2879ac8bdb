"""The project's commands as a user meets them: loaded, or run in a process of their own.

`run` and `Command` have fork_server.py fork the process, in which the command is then run as the
script it is: its arguments, environment, signals and exit code are real. Each command is also
started by the interpreter at least once: see `python`.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

from fork_server import CONTEXTS, SERVER, SpawnByServer, become, server_access
from paths import REPOSITORY

from moco_det.common.launch import free_local_url

# One thread each: the processes of a test, and of the test beside it, share the cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

# Before a command: it computes in float64.
IN_FLOAT64 = ("tests/support/float64.py",)


def load_command(path: str) -> ModuleType:
    """The module of a command; by path, as Detectron2's checkout has a package `tools` as well."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_command", REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(
    path: str, *arguments, environment: dict[str, str] | None = None, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """A command run by the interpreter, as its user does: what importing it does shows here."""
    command = [sys.executable, *launcher, str(REPOSITORY / path), *map(str, arguments)]
    env = {**os.environ, **ONE_THREAD, **(environment or {})}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def torchrun(path: str, *arguments) -> subprocess.CompletedProcess:
    """A command run in two processes by torchrun itself."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return python(path, *arguments, launcher=launcher)


def run(path: str, *arguments, **options) -> subprocess.CompletedProcess:
    """A command run to its end by the server; `options` are those of `Command`."""
    with tempfile.NamedTemporaryFile("r") as errors:
        with Command(path, *arguments, stderr=errors.name, **options) as command:
            out = command.stdout.read()
            code = command.wait()
        return subprocess.CompletedProcess(arguments, code, out, errors.read())


class Command:
    """A command running in a process that the server has forked; the names are Popen's.

    Args:
        path: of the script, from the repository's root.
        arguments: its command line, turned into strings.
        environment: variables to set.
        before: called in the process before the command; a module's function.
        stderr: a file for it; without one it goes where stdout does.
    """

    def __init__(
        self,
        path: str,
        *arguments,
        environment: dict[str, str] | None = None,
        before: Callable[[], object] | None = None,
        stderr: str | None = None,
    ):
        reader, writer = Pipe(duplex=False)
        argv = [str(REPOSITORY / path), *map(str, arguments)]
        env = {**os.environ, **ONE_THREAD, **(environment or {})}
        given = (argv, server_access(), env, writer, stderr, before)
        self.process = SERVER.Process(target=_run, args=given)
        self.process.start()
        writer.close()
        self.pid = self.process.pid
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        reader.close()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *exception) -> None:
        if self.poll() is None:
            self.kill()
        self.wait()

    def poll(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        """With the processes that it has started, which would wait for it for ever."""
        os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 600) -> int:
        """The exit code; that of a process ended by a signal is the signal's, negative."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s"
        self.stdout.close()
        return self.process.exitcode


def _run(argv, server, env, stdout: Connection, stderr: str | None, before) -> None:
    """The life of the forked process."""
    os.setpgid(0, 0)  # leads the group that its own processes belong to
    writer = os.dup(stdout.fileno())
    stdout.close()
    become(server, env, writer, os.open(stderr, os.O_WRONLY) if stderr else writer)
    multiprocessing.set_start_method(None, force=True)  # the interpreter's, not "forkserver"
    CONTEXTS["spawn"] = SpawnByServer()
    if before is not None:
        before()
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    try:
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    # As at the interpreter's end: the frames that the exception has held, and their loaders, go
    # before the processes that are left are waited for.
    sys.exit(code)


def run_as_torchrun(path: str, *arguments) -> subprocess.CompletedProcess:
    """A command run in two processes that find in their environment what torchrun would put there.

    Returns:
        The highest exit code, and what all of them have printed.
    """
    address, port = free_local_url().removeprefix("tcp://").split(":")
    world = {"MASTER_ADDR": address, "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    world |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(Command(path, *arguments, environment=world | ranks))
            for ranks in ({"RANK": rank, "LOCAL_RANK": rank} for rank in "01")
        ]
        printed = [command.stdout.read() for command in started]
        codes = [command.wait() for command in started]
    return subprocess.CompletedProcess(arguments, max(codes, key=abs), "".join(printed), "")
