"""--help of every command: what it says, how little it imports, and a clone without packages."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from paths import REPOSITORY
from readme_commands import parse

from moco_det.__main__ import COMMANDS
from moco_det.benchmark import pretrain_step
from moco_det.weights import SUFFIXES
from moco_det.weights.conversion import TARGETS
from pretrain.data import benchmarks
from pretrain.data.multi_crop import STRONG
from pretrain.engine import device, optimization
from pretrain.evaluation import svm
from pretrain.flags import common, evaluation, pretraining, views
from pretrain.moco import MECHANISMS
from pretrain.moco.losses import LOSSES

SCRIPTS = list(COMMANDS.values())

# Prints, for each script of argv, how it ends where it is called with the flags of its line.
RUN_ALL = """
import contextlib, io, json, runpy, sys
ends = {}
for line in sys.argv[1:]:
    said, code = io.StringIO(), None
    script, *flags = line.split()
    sys.argv = [script, *flags]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
    ends[line] = code, said.getvalue()
print(json.dumps([ends, sorted(sys.modules)]))
"""


def run_all(lines: list[str], *options: str) -> tuple[dict[str, tuple[object, str]], set[str]]:
    """Line -> (exit code, what was printed), and the modules that were imported for all of them."""
    command = [sys.executable, *options, "-c", RUN_ALL, *lines]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    ends, modules = json.loads(done.stdout)
    return ends, set(modules)


def test_help_and_mistakes_import_nothing_that_takes_seconds():
    helps = [f"{script} --help" for script in SCRIPTS]
    slips = [f"{script} x --no-such-flag" for script in SCRIPTS]
    ends, modules = run_all(helps + slips)
    for line in helps:
        assert ends[line][0] == 0, line
        assert ends[line][1].startswith("usage: "), line
    for line in slips:
        code, said = ends[line]
        assert code == 2, line
        assert said.startswith("error: ") and said.count("\n") == 1, said
    heavy = {"torch", "torchvision", "numpy", "cv2", "PIL", "fvcore", "pycocotools", "detectron2"}
    assert modules & heavy == set()
    assert "yaml" in modules  # they are named as they are imported


def test_a_clone_that_is_not_installed_says_how_to():
    ends, _ = run_all(SCRIPTS, "-I", "-S")  # without any package
    for script, (code, said) in ends.items():
        assert code == (
            "error: No module named 'moco_det': pip install -e . in the folder of moco_det"
        ), script
        assert said == ""


class Found(BaseException):
    """Carries a parser out of its command."""


def parsers(script: str) -> Iterator[argparse.ArgumentParser]:
    """That of a command, and those of its subcommands."""

    def found(self, *arguments):
        raise Found(self)

    with patch.object(argparse.ArgumentParser, "parse_args", found):
        try:
            parse(Path(script), [])
        except Found as parser:
            (whole,) = parser.args
    yield whole
    for action in whole._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained_with_its_default(script):
    for parser in parsers(script):
        text = parser.format_help()
        assert not re.search(r"\b(None|True|False)\b", text)
        for action in parser._actions:
            flag = f"{parser.prog} {'/'.join(action.option_strings) or action.dest}"
            if isinstance(action, argparse._SubParsersAction):
                assert all(choice.help for choice in action._choices_actions), flag
                continue
            assert action.help, flag
            takes_a_value = action.option_strings and action.nargs != 0
            if takes_a_value and not action.required:
                help_text = parser._get_formatter()._get_help_string(action)
                assert "default" in help_text, flag


def test_names_within_flags_are_those_of_what_they_choose():
    """They stand there once more, because what they name takes seconds to import."""
    assert tuple(optimization.AMP_DTYPES) == common.AMP
    assert device.COMPILE == pretraining.COMPILE
    assert tuple(MECHANISMS) == pretraining.MECHANISMS
    assert tuple(LOSSES) == pretraining.LOSSES
    assert tuple(STRONG) == views.STRONG
    assert (benchmarks.FOLDERS, *benchmarks.BENCHMARKS) == evaluation.DATASETS
    assert (svm.COST, svm.COSTS, svm.FOLDS) == (evaluation.COST, evaluation.COSTS, evaluation.FOLDS)
    assert TARGETS.keys() == SUFFIXES.keys()
    compiled = next(
        action.choices
        for parser in parsers("tools/benchmark.py")
        for action in parser._actions
        if parser.prog.endswith("pretrain-step") and "--compile" in action.option_strings
    )
    assert compiled == pretrain_step.COMPILED
