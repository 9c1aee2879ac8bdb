"""The commands that READMEs and YAML headers show, as lists of words, and the commands' parsers."""

import argparse
import re
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

REPOSITORY = Path(__file__).resolve().parents[2]
READMES = [Path("README.md")] + sorted(
    path.relative_to(REPOSITORY)
    for folder in ("configs", "moco_det", "pretrain", "tools", "tests")
    for path in (REPOSITORY / folder).rglob("README.md")
)
CONFIGS = sorted(
    path.relative_to(REPOSITORY)
    for path in (REPOSITORY / "configs").rglob("*.yaml")
    if not path.name.startswith("Base-")
)


@dataclass(frozen=True)
class Command:
    """`words` as a shell passes them on; `where`: the file that shows it, and its line."""

    words: list[str]
    where: str

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"

    @property
    def script(self) -> Path | None:
        """The script that it runs, or the module of `python -m`; None for other programs."""
        at = self._script_at()
        if at is None:
            return None
        if self.words[at - 1] == "-m":
            return Path(*self.words[at].split(".")).with_suffix(".py")
        return Path(self.words[at])

    @property
    def arguments(self) -> list[str]:
        """Those of the script."""
        at = self._script_at()
        return [] if at is None else self.words[at + 1 :]

    def _script_at(self) -> int | None:
        words = self.words
        if words[0] not in ("python", "torchrun"):
            return None
        if words[1] == "-m":
            return 2
        return next(i for i, word in enumerate(words) if word.endswith(".py"))


def readme_commands(path: Path) -> list[Command]:
    """Those of every ```bash block of a README, in their order."""
    lines = (REPOSITORY / path).read_text().splitlines()
    shown, inside = [], False
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            inside = line == "```bash"
        elif inside:
            shown.append((number, line))
    return _commands(path, shown)


def header_commands(path: Path) -> list[Command]:
    """Those of a YAML's opening comment: lines that begin with a program, continued by a `\\`."""
    shown, continued = [], False
    for number, line in enumerate((REPOSITORY / path).read_text().splitlines(), 1):
        if not line.startswith("#"):
            break
        text = re.sub(r"^Command: *", "", line[1:].strip())
        if continued or text.startswith(("python ", "torchrun ", "pip ")):
            shown.append((number, text))
            continued = text.endswith("\\")
    return _commands(path, shown)


def _commands(path: Path, lines: list[tuple[int, str]]) -> list[Command]:
    """Split at line ends that no backslash continues, and at `&&`."""
    found, open_line = [], ""
    for number, line in lines:
        if line.endswith("\\"):
            open_line += line[:-1]
            continue
        words: list[str] = []
        for word in [*shlex.split(open_line + line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                found.append(Command(words, f"{path}:{number}"))
                words = []
        open_line = ""
    return found


class _Parsed(BaseException):
    """Carries the flags out of a command, past all that it does with them."""


def parse(script: Path, arguments: list[str]) -> argparse.Namespace:
    """By the command's own parser and checks, which raise SystemExit or UserError."""

    original = argparse.ArgumentParser.parse_args

    def start_command(parse_flags):
        with patch.object(argparse.ArgumentParser, "parse_args", original):
            raise _Parsed(parse_flags(arguments))

    def parse_args(self, args=None, namespace=None):  # of a module for `python -m`
        raise _Parsed(original(self, args, namespace))

    with (
        patch("moco_det.common.errors.start_command", start_command),
        patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        patch("sys.argv", [str(script), *arguments]),
    ):
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        except _Parsed as flags:
            return flags.args[0]
    raise AssertionError(f"{script} parses no flags")
