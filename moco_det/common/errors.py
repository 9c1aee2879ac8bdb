"""What a user can put right: one message, an exit code, no traceback."""

import argparse
import contextlib
import importlib
import sys
from types import ModuleType

# Exit code after SIGTERM: the state is saved, and the same command goes on from it when it resumes.
# 75 is EX_TEMPFAIL of sysexits.h, "try again later"; schedulers can requeue on it.
EXIT_INTERRUPTED = 75


class UserError(Exception):
    """Bad input, a missing file, an impossible setting: the message names it and the remedy."""


@contextlib.contextmanager
def exit_cleanly():
    """Turn a `UserError` into one line on stderr and exit code 1, and Ctrl-C into exit code 130."""
    print_any_name()
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def command_parser(description: str, exit_codes: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command whose --help prints both texts, the first as it is laid out."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=exit_codes and f"exit codes: {exit_codes}",
    )


def print_any_name() -> None:
    """Print the bytes of a file's name that the terminal's encoding lacks as escapes, from now on.

    Python would raise an error that has nothing to do with what is printed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # not a stream of text
            stream.reconfigure(errors="backslashreplace")


def import_optional(module: str, needed_by: str, install: str) -> ModuleType:
    """The module of an optional package.

    Args:
        needed_by: what cannot be done without it, the subject of the message.
        install: the package as `pip install` knows it.

    Raises:
        UserError: it cannot be imported; names the package.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{needed_by} needs the package {install}: pip install {install} ({error})"
        ) from error
