"""How a process ends: in seconds, whatever its children and its clean-up wait for.

Light enough to be imported before everything else: see `start_command`.
"""

import contextlib
import multiprocessing.util
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

EXIT_CTRL_C = 128 + signal.SIGINT
SECONDS = 10.0  # from an error to the end of the process
AGAIN = 1.0  # a launcher and its process group deliver one request within less than this

_registered_in = 0  # the process whose end is prepared; a fork has to do it again
_exit_code: int | None = None  # of a process that has failed


def start_command() -> None:
    """To be called first in a command, before the imports that take seconds.

    Ctrl-C ends it with one line, until `exit_cleanly` takes over. Once it fails, it ends within
    `SECONDS`.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end_by_ctrl_c)
    prepare_end()


def _end_by_ctrl_c(signum: int, frame: FrameType | None) -> None:
    # No exception: half-imported packages turn one into their own, or swallow it.
    end_now(EXIT_CTRL_C, "interrupted")


def restore_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again after `start_command`."""
    if signal.getsignal(signal.SIGINT) is _end_by_ctrl_c:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def prepare_end() -> None:
    """Have this process, when it ends, not wait for the loader's workers.

    Python asks such children to end by SIGTERM and then waits for them for ever. Ours ignore it, so
    that they do not fail a run that is asked to save its state.
    """
    global _registered_in
    if _registered_in != os.getpid():
        _registered_in = os.getpid()
        multiprocessing.util.Finalize(None, _end, exitpriority=1000)


def ignore_children() -> None:
    """From now on, whatever becomes of the loader's workers raises nothing.

    torch raises an error whenever a child ends after a worker was killed: also where the first of
    these errors is being reported.
    """
    _set_handler(signal.SIGCHLD, signal.SIG_DFL)


def note_failure(code: int) -> None:
    """This process is about to exit with `code`, and has `SECONDS` for its clean-up."""
    global _exit_code
    _exit_code = code


def _end() -> None:
    if _exit_code:
        for number in (signal.SIGINT, signal.SIGTERM):
            _set_handler(number, signal.SIG_DFL)  # whoever is impatient ends it at once
        timer = threading.Timer(SECONDS, end_now, [_exit_code])
        timer.daemon = True
        timer.start()
    _kill_children(daemons_only=True)


def end_now(code: int, line: str = "") -> NoReturn:
    """End this process and its children at once, from a signal handler or any thread."""
    with contextlib.suppress(OSError):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode() if line else b"")
    _kill_children(daemons_only=False)
    os._exit(code)


def _kill_children(daemons_only: bool) -> None:
    ignore_children()
    for child in multiprocessing.active_children():
        if child.daemon or not daemons_only:
            child.kill()


def _set_handler(number: int, handler) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)
