"""What runs of pretrain's scripts on an encoder have in common: data, flags, command, identity."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moco_det.benchmark.jobs.ablation import NO_SETTINGS, accepted
from moco_det.benchmark.jobs.grid import EncoderRun
from moco_det.common.files import file_hash
from moco_det.common.installation import own_file
from moco_det.datasets import data_root
from pretrain.flags.common import as_flags
from pretrain.flags.dense import (
    davis_parser,
    parse_davis,
    parse_segment_retrieval,
    segment_retrieval_parser,
)
from pretrain.flags.evaluation import linear_parser, parse_linear, parse_voc_svm, voc_svm_parser


class Flags(NamedTuple):
    """Those of a script: its parser, and what reads and checks them."""

    parser: Callable[[], ArgumentParser]
    parse: Callable[[list[str]], Namespace]


# Script in pretrain/ -> its flags.
FLAGS = {
    "linear": Flags(linear_parser, parse_linear),
    "voc_svm": Flags(voc_svm_parser, parse_voc_svm),
    "segment_retrieval": Flags(segment_retrieval_parser, parse_segment_retrieval),
    "davis": Flags(davis_parser, parse_davis),
}


def data_folder(run: EncoderRun) -> Path:
    """DATA of the command."""
    return data_root().absolute() / run.experiment.data


def run_flags(run: EncoderRun) -> list[str]:
    """The flags of the run as words. Raises UserError for one that the command does not know."""
    values = dict(run.flags)
    recipe = values.pop("recipe", None)
    words = as_flags(values, FLAGS[run.command].parser(), f"the flags of {run.name}")
    return [*(["--recipe", recipe] if recipe else []), *words]


def parsed(run: EncoderRun) -> Namespace:
    """What the command will make of its flags. Raises UserError for what it refuses."""
    words = [str(data_folder(run)), *run_flags(run)]
    return accepted(FLAGS[run.command].parse, words, run.name)


def encoder_command(run: EncoderRun, gpus: int, launch: Sequence[str], *flags: str) -> list[str]:
    """The run as one would type it.

    Args:
        launch: torchrun and its arguments; without it the script starts a process for each GPU.
        flags: that say where its results go.

    Raises:
        UserError: the script would refuse the run's flags.
    """
    hidden = ["env", "CUDA_VISIBLE_DEVICES="] if run.cpu else []
    spawned = ["--multiprocessing-distributed"] if gpus > 1 and not launch else []
    return [
        *hidden, *(launch or [sys.executable]), str(own_file(f"pretrain/{run.command}.py")),
        str(data_folder(run)), *run_flags(run), *spawned, "--seed", str(run.trial), *flags,
    ]  # fmt: skip


def identity(run: EncoderRun) -> dict[str, Any]:
    """See `Job`: the flags that are not at their defaults, less those that no number depends on."""
    defaults, pretrained = FLAGS[run.command].parser(), run.flags["pretrained"]
    settings = {
        name: value
        for name, value in vars(parsed(run)).items()
        if value != defaults.get_default(name)
        and name not in {*NO_SETTINGS, "print_freq", "pretrained"}
    }
    given = Path(pretrained).is_file()
    return {
        "flags": settings,
        "weights": file_hash(Path(pretrained)) if given else pretrained,
        "seed": run.trial,
    }
