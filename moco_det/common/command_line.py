"""Flags: a parser whose errors are one line and name the nearest flag."""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake with one line instead of all flags."""

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
        self.exit(2, f"error: {message}{near if unknown else ''} (--help lists the flags)\n")


def _before_separator(args: Sequence[str]) -> list[str]:
    words = list(args)
    return words[: words.index("--")] if "--" in words else words


def command_parser(description: str, exit_codes: str | None = None) -> CommandParser:
    """The parser of a command whose --help prints both texts, the first as it is laid out."""
    return CommandParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=exit_codes and f"exit codes: {exit_codes}",
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" where one of `known` is close to `name`, else nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def at_least(lowest: int) -> Callable[[str], int]:
    """A flag's `type`: whole numbers from `lowest` on."""

    def count(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, not {value}")
        return value

    count.__name__ = "int"  # for argparse's own message on what is no number
    return count
