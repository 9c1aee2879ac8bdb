"""What a user can put right: one message, an exit code, no traceback."""

import contextlib
import sys


class UserError(Exception):
    """Bad input, a missing file, an impossible setting: the message names it and the remedy."""


@contextlib.contextmanager
def exit_cleanly():
    """Turn a `UserError` raised in the body into one line on stderr and exit code 1."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
