"""How a run of this folder ends when a person has to act."""

# Exit code after SIGTERM: the state is saved and the same command with `--resume auto` goes on.
# 75 is EX_TEMPFAIL of sysexits.h, "try again later"; schedulers can requeue on it.
EXIT_INTERRUPTED = 75


class UserError(SystemExit):
    """Bad input or an impossible setting: one message on stderr, exit code 1, no traceback."""

    def __init__(self, message: str):
        super().__init__(f"error: {message}")
