"""How a process ends: in seconds, whatever its children and its clean-up wait for.

Light enough to be imported before everything else: see `errors.start_command`.
"""

import contextlib
import multiprocessing.util
import os
import select
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

EXIT_CTRL_C = 128 + signal.SIGINT
EXIT_READER_GONE = 128 + signal.SIGPIPE  # whoever read what is printed has gone, as `head` does
SECONDS = 10.0  # from an error to the end of the process
AGAIN = 1.0  # a launcher and its process group deliver one request within less than this
# Seconds before a process of torchrun tells of its failure: see `await_turn`.
AFTER_THE_FIRST = 5.0  # the first has ended by then
AFTER_EACH = 0.3  # torchrun looks at its processes every 0.1 s
AFTER_THE_CAUSE = 10.0

_registered_in = 0  # the process whose end is prepared; a fork has to do it again
_exit_code: int | None = None  # of a process that has failed


def hold_ctrl_c() -> None:
    """From now on Ctrl-C ends this process with one line; until `restore_ctrl_c`."""
    _set_handler(signal.SIGINT, _end_by_ctrl_c)


def _end_by_ctrl_c(signum: int, frame: FrameType | None) -> None:
    # No exception: half-imported packages turn one into their own, or swallow it.
    end_now(EXIT_CTRL_C, "interrupted")


def restore_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again after `hold_ctrl_c`."""
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


def flush_output() -> bool:
    """Pass on what is printed so far; whether somebody reads it, which nobody does behind `| head`.

    What is printed to nobody goes nowhere from then on, without an error.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no stdout, or a closed one
        output, reader = sys.stdout.fileno(), select.poll()
        reader.register(output, 0)
        if reader.poll(0):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, output)
            os.close(nowhere)
            return False
        sys.stdout.flush()
    return True


def await_turn(consequence: bool = False) -> None:
    """Before this process tells why it fails: torchrun's processes mostly fail alike.

    The first one of a machine tells at once, and ends. That makes torchrun end the others, which
    wait here. What none has told before is told at the end of the wait.

    Args:
        consequence: it fails because another one does.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    number = int(os.environ.get("LOCAL_RANK", 0))
    seconds = number and AFTER_THE_FIRST + AFTER_EACH * number
    seconds += AFTER_THE_CAUSE * consequence
    if seconds:
        _set_handler(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(seconds)


def note_failure(code: int) -> None:
    """This process is about to exit with `code`, and has `SECONDS` for its clean-up."""
    global _exit_code
    _exit_code = code


def _end() -> None:
    flush_output()
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
