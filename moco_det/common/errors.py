"""What a user can put right: one message, an exit code, no traceback; and flags that answer so.

Light enough to be imported before everything else: see `start_command`.
"""

import argparse
import contextlib
import difflib
import errno
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import NoReturn

from moco_det.common import ending

# Exit code after SIGTERM: the state is saved, and the same command goes on from it when it resumes.
# 75 is EX_TEMPFAIL of sysexits.h, "try again later"; schedulers can requeue on it.
EXIT_INTERRUPTED = 75

LONGEST = 300  # characters of a message


class UserError(Exception):
    """Bad input, a missing file, an impossible setting: the message names it and the remedy."""


def one_line(text: object, most: int = LONGEST) -> str:
    """The text on one line of printable characters, the middle of a long one left out."""
    clean = " ".join(str(text).split())
    if not clean.isprintable():
        clean = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in clean)
    half = most // 2 - 3
    return clean if len(clean) <= most else f"{clean[:half]} ... {clean[-half:]}"


def start_command(parse: Callable[[list[str]], object]) -> None:
    """To be called in a command before the imports that take seconds.

    `parse` answers --help and mistakes in the flags. Then Ctrl-C ends the command with one line,
    and so does a package that cannot be imported, until `exit_cleanly` takes over. Once it fails,
    it ends within `ending.SECONDS`.
    """
    ending.prepare_end()
    sys.excepthook = _tell_uncaught
    with exit_cleanly():
        parse(sys.argv[1:])
    ending.hold_ctrl_c()


def _tell_uncaught(kind, error, trace) -> None:
    if isinstance(error, BrokenPipeError) and not ending.flush_output():
        return
    line = str(error) if isinstance(error, UserError) else explained(error)
    if line is None:
        sys.__excepthook__(kind, error, trace)
    else:
        _tell(f"error: {line}", consequence=is_lost_peer(error))


@contextlib.contextmanager
def exit_cleanly():
    """Turn what a user can understand into one line on stderr, and give each end its exit code.

    1 for a `UserError` and for what `explained` knows, 130 for Ctrl-C, 141 where nobody reads what
    is printed any more. Other exceptions pass. A command that has begun with `start_command` ends
    within seconds after any of these. Of torchrun's processes that fail alike one prints its line.
    """
    print_any_name()
    ending.restore_ctrl_c()
    try:
        yield
    except SystemExit as end:
        ending.note_failure(end.code if isinstance(end.code, int) else 1)
        raise
    except KeyboardInterrupt:
        ending.note_failure(ending.EXIT_CTRL_C)
        _write("interrupted")
        sys.exit(ending.EXIT_CTRL_C)
    except Exception as error:
        ending.ignore_children()
        ending.note_failure(1)
        if isinstance(error, BrokenPipeError) and not ending.flush_output():
            sys.exit(ending.EXIT_READER_GONE)
        line = str(error) if isinstance(error, UserError) else explained(error)
        if line is None:
            raise
        _tell(f"error: {line}", consequence=is_lost_peer(error))
        sys.exit(1)


def _tell(line: str, consequence: bool = False) -> None:
    """Why this process fails, unless torchrun ends it because of another."""
    ending.await_turn(consequence)
    _write(line)


def _write(line: str) -> None:
    sys.stderr.write(f"{line}\n")  # at once: several processes may write to it
    sys.stderr.flush()


# -- other packages' errors that are no bug -------------------------------------------------------

KILLED_FOR_MEMORY = "as the kernel does where memory runs out"

LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Socket Timeout|Connection refused"
    r"|remote process exited|NCCL communicator was aborted|Timed out waiting \d+ms for",
    re.IGNORECASE,
)
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
UNREACHABLE = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES}


def explained(error: BaseException) -> str | None:
    """What happened and what helps, in one line; None for an error that is not known here."""
    text = str(error)
    if killed := re.search(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([\w ]+)", text):
        return _killed_worker(f" (pid {killed[1]})", killed[2].strip())
    if ended := re.search(r"DataLoader worker \(pid\(s\) ([\d, ]+)\) exited unexpectedly", text):
        return _killed_worker(f" (pid {ended[1]})", "Killed")
    if isinstance(error, ConnectionError | EOFError) and _while_fetching_tensors(error):
        return _killed_worker("", "Killed")
    if "out of memory" in text and (type(error).__name__ == "OutOfMemoryError" or "CUDA" in text):
        what = ". ".join(text.splitlines()[0].split(". ")[:2])
        return (
            f"{what}: lower the batch (--batch-size, SOLVER.IMS_PER_BATCH) or raise "
            "SOLVER.GRADIENT_ACCUMULATION_STEPS, use more GPUs, or mixed precision (--amp bf16, "
            "SOLVER.AMP.ENABLED True)"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"the machine's memory is too small for this: {text or 'out of memory'}"
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return "the port of --dist-url is in use: pass another one"
    if is_lost_peer(error):
        return "the connection to another process of this run broke: see what that one has printed"
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"cannot write{f' {error.filename}' * bool(error.filename)}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in UNREACHABLE and error.filename:
        return f"cannot use the path {one_line(error.filename, 200)}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and is_absent(package := error.name or ""):
        return f"the package {package.split('.')[0]} is not installed: {how_to_install(package)}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the machine: CUDA's error has a class of its own, the CPU allocator's only its
    words."""
    text = str(error)
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "allocate memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text


def tells_of_a_worker(error: BaseException) -> bool:
    """Whether it is torch's about a killed loader process, raised amid whatever was being done."""
    return "DataLoader worker" in str(error)


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error only tells that another process of the run has ended."""
    distributed = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    text = str(error)
    return bool(LOST_PEER.search(text)) and (distributed or "gloo" in text or "TCPStore" in text)


def _while_fetching_tensors(error: BaseException) -> bool:
    """From another process of this machine, which has promised them and is no more."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename.endswith("torch/multiprocessing/reductions.py") for frame in frames)


def _killed_worker(pid: str, name: str) -> str:
    if name == "Bus error":
        return (
            f"a data loading process{pid} ran out of shared memory: enlarge /dev/shm "
            "(docker run --shm-size 8g), or pass fewer --workers (DATALOADER.NUM_WORKERS)"
        )
    why = f", {KILLED_FOR_MEMORY}" if name == "Killed" else f" ({name})"
    return (
        f"a data loading process{pid} was killed{why}: pass fewer --workers "
        "(DATALOADER.NUM_WORKERS), or give the run more memory"
    )


def print_any_name() -> None:
    """Print the bytes of a file's name that the terminal's encoding lacks as escapes, from now on.

    Python would raise an error that has nothing to do with what is printed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # not a stream of text
            stream.reconfigure(errors="backslashreplace")


# -- packages that may be absent ------------------------------------------------------------------

# Module -> the extra of setup.py that its package is in; all others are needed by everything.
EXTRAS = {
    "cityscapesscripts": "cityscapes",
    "faster_coco_eval": "lvis",
    "huggingface_hub": "hub",
    "mlflow": "mlflow",
    "pyarrow": "parquet",
    "safetensors": "hub",
    "scipy": "densepose",
    "sklearn": "evaluation",
    "submitit": "slurm",
    "wandb": "wandb",
    "webdataset": "webdataset",
}
DISTRIBUTIONS = {  # where pip calls it something else
    "faster_coco_eval": "faster-coco-eval",
    "sklearn": "scikit-learn",
}


def is_absent(module: str) -> bool:
    """Whether it belongs to a package of others that is not installed."""
    top = module.split(".")[0]
    ours = top in ("", "moco_det", "pretrain")
    return not ours and importlib.util.find_spec(top) is None


def how_to_install(module: str) -> str:
    """The words for pip, typed in the folder of this project."""
    top = module.split(".")[0]
    if top not in EXTRAS:
        return "pip install -e . in the folder of moco_det"
    package = DISTRIBUTIONS.get(top, top)
    return f"pip install {package}, or pip install -e '.[{EXTRAS[top]}]' in the folder of moco_det"


def import_optional(module: str, needed_by: str, install: str) -> ModuleType:
    """The module of an optional package.

    Args:
        needed_by: what cannot be done without it, the subject of the message.
        install: the package as `pip install` knows it.

    Raises:
        UserError: it cannot be imported; names the package, and its extra.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a damaged package, or one for other versions, may raise anything
        remedy, top = f"pip install {install}", module.split(".")[0]
        if top in EXTRAS:
            install, remedy = DISTRIBUTIONS.get(top, top), how_to_install(module)
        reason = one_line(error, 150)
        if not isinstance(error, ImportError):
            reason = f"as it is, it cannot be imported: {type(error).__name__}: {reason}"
        raise UserError(f"{needed_by} needs the package {install}: {remedy} ({reason})") from error


# -- flags -----------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a flag's default where it has one that its help does not name.

    A description of several lines is printed as it is laid out.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if isinstance(action, argparse.BooleanOptionalAction):
            text = text.removesuffix(" (default: %(default)s)")  # added before Python 3.13
            default = "yes" if default else "no"
        nothing = default is None or default is False or default in ("", [], argparse.SUPPRESS)
        if nothing or "default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown})".replace("%", "%%")


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake with one line instead of all flags."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"formatter_class": HelpFormatter} | options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        args = sys.argv[1:] if args is None else args
        unknown = [] if self._subparsers else self._unknown_flags(args)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return super().parse_known_args(args, namespace)

    def _unknown_flags(self, args: Sequence[str]) -> list[str]:
        """Found first: what follows them may be taken for something else and complained of."""
        flags = [word.split("=")[0] for word in _before_separator(args) if word.startswith("--")]
        return [flag for flag in flags if not self._known(flag)]

    def _known(self, flag: str) -> bool:
        known = self._option_string_actions
        return flag in known or (self.allow_abbrev and any(name.startswith(flag) for name in known))

    def error(self, message: str) -> NoReturn:
        head, unknown, words = message.partition("unrecognized arguments: ")
        flags = [word for word in words.split() if word.startswith("-")]
        near = nearest(flags[0].split("=")[0], self._option_string_actions) if flags else ""
        ending.await_turn()
        self.exit(2, f"error: {message}{near if unknown else ''} (--help lists the flags)\n")


def _before_separator(args: Sequence[str]) -> list[str]:
    words = list(args)
    return words[: words.index("--")] if "--" in words else words


def command_parser(description: str, exit_codes: str | None = None) -> CommandParser:
    """The parser of a command whose --help prints both texts, the first as it is laid out."""
    return CommandParser(description=description, epilog=exit_codes and f"exit codes: {exit_codes}")


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" where one of `known` is close to `name`, else nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def at_least(lowest: int, highest: int = 10**9) -> Callable[[str], int]:
    """A flag's `type`: whole numbers from `lowest` to `highest`."""

    def count(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, not {value}")
        if value > highest:
            raise argparse.ArgumentTypeError(f"must be at most {highest}, not {value}")
        return value

    count.__name__ = "int"  # for argparse's own message on what is no number
    return count
