"""What the flags of several commands have in common: definitions, recipes, checks."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from moco_det.common.documents import read_mapping, shown
from moco_det.common.errors import CommandParser, UserError, nearest, one_line
from moco_det.common.files import MAX_PIXELS
from moco_det.common.installation import yaml_path
from moco_det.common.official_weights import OFFICIAL

# Of `optimization.AMP_DTYPES`: what flags are made of is imported within the second of --help.
AMP = ("none", "bf16", "fp16")
LOG = ("tensorboard", "wandb", "mlflow", "none")  # of `trackers.TRACKERS`
SWITCH = argparse.BooleanOptionalAction  # --mlp and --no-mlp
KNN_BANK = {
    "default": None,
    "type": int,
    "metavar": "N",
    "help": "neighbours are looked for among N images of train, drawn by the seed; default: all",
}
LONGEST_VALUE = 200  # characters
PRETRAINED = (
    "checkpoint of any known layout: a file, https://..., hf://ORGANISATION/REPOSITORY/FILE, "
    f"torchvision://NAME, {', '.join(OFFICIAL)}; random: as initialised; supervised: torchvision's"
)
TRAINING_COUNTS = ["epochs", "batch_size", "print_freq", "image_size", "max_image_pixels"]


def base_parser(
    description: str, data: str, arch: str, image_size: str = "side of a view in pixels"
) -> argparse.ArgumentParser:
    """The flags of every command; `data`, `arch` and `image_size` are help texts."""
    parser = CommandParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("data", metavar="DATA", help=data)
    add("-a", "--arch", default="resnet50", help=arch)
    add("-j", "--workers", default=len(os.sched_getaffinity(0)), type=int,
        help="data loading processes on this node")  # fmt: skip
    add("--image-size", default=224, type=int, help=image_size)
    add("--max-image-pixels", default=MAX_PIXELS, type=int,
        help="pixels; larger image files are refused")  # fmt: skip
    add = parser.add_argument_group("launch, as in the official code; or use torchrun").add_argument
    add("--world-size", default=-1, type=int,
        help="nodes, or processes without --multiprocessing-distributed; -1: one")  # fmt: skip
    add("--rank", default=-1, type=int, help="number of this node, or process; -1: 0")
    add("--dist-url", default=None, help="tcp://HOST:PORT, or env://; default: a free port")
    add("--dist-backend", default="nccl", help="of torch.distributed on GPUs; CPUs use gloo")
    add("--gpu", default=None, type=int, help="number of the one GPU to use; default: the first")
    add("--multiprocessing-distributed", action="store_true", help="one process per GPU")
    return parser


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of main_moco.py and main_lincls.py; our commands set the defaults that differ."""
    add = parser.add_argument
    add("--recipe", type=yaml_path, metavar="YAML",
        help="flags by their long names; a flag given beside it wins; default: none")  # fmt: skip
    add("--output", metavar="DIR", help="folder for checkpoints and logs")
    add("--epochs", type=int, help="length of the run in epochs")
    add("--start-epoch", default=0, type=int,
        help="epoch of the schedule that a new run begins with")  # fmt: skip
    add("-b", "--batch-size", default=256, type=int,
        help="images; global: of all processes together")  # fmt: skip
    add("--lr", "--learning-rate", type=float, dest="lr",
        help="learning rate, for a global batch of 256; not scaled automatically")  # fmt: skip
    add("--schedule", nargs="*", type=int, help="epochs to divide lr by 10")
    add("--momentum", default=0.9, type=float, help="of SGD, in [0, 1]")
    add("--wd", "--weight-decay", type=float, dest="weight_decay", help="factor, on all parameters")
    add("-p", "--print-freq", default=10, type=int, help="steps between two log lines")
    add("--log", nargs="+", default=["tensorboard"], choices=LOG,
        help="what shows numbers and pictures of the run, one or several; metrics.jsonl is written "
        "in any case; wandb and mlflow are extras")  # fmt: skip
    add("--resume", default="", metavar="PATH|auto",
        help="checkpoint to go on from; auto: --output's last one, if any; "
        "default: a new run")  # fmt: skip
    add("--restart-epoch", action="store_true",
        help="resume at the beginning of the epoch, on whatever images")  # fmt: skip
    add("--overwrite", action="store_true", help="delete the run that --output holds")
    add("--seed", default=None, type=int,
        help="of all draws; kernels of a GPU still round freely; default: drawn")  # fmt: skip
    add("--deterministic", action=SWITCH, default=False,
        help="on a GPU the same bits each time; steps take about half as long again")  # fmt: skip
    add("--amp", default="auto", choices=["auto", *AMP],
        help="mixed precision of the encoder; auto: a resumed run's own, else bf16 on GPUs that "
        "have it")  # fmt: skip
    add("--save-steps", default=0, type=int,
        help="also save the last checkpoint every N steps; 0: after epochs only")  # fmt: skip
    add("--max-unreadable", default=0.01, type=float,
        help="share of the images that may be unreadable")  # fmt: skip


def parse_with_recipe(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Flags over recipe over defaults; the recipe is read as flags, which argparse checks."""
    args = parser.parse_args(argv)
    if args.recipe:
        flags = as_flags(read_mapping(args.recipe, "--recipe"), parser, f"--recipe {args.recipe}")
        recipe = parser.parse_args([*flags, "--", args.data])
        parser.set_defaults(**vars(recipe))
        args = parser.parse_args(argv)
    return args


def check_training(args: argparse.Namespace) -> None:
    """What both commands that train ask of their flags. Raises UserError."""
    check(args, TRAINING_COUNTS, lambda count: count >= 1, "at least 1")
    if "none" in args.log and len(args.log) > 1:
        raise UserError(f"--log {' '.join(args.log)}: none goes with no other")
    if args.resume and args.overwrite:
        raise UserError("--resume goes on from a run and --overwrite deletes it: pass one of them")
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch}: there are --epochs {args.epochs}")


def check(
    args: argparse.Namespace, names: list[str], holds: Callable[[float], bool], what: str
) -> None:
    """Raises UserError for a flag that is given, and is not `what` `holds` for."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise UserError(f"--{name.replace('_', '-')} must be {what}")


def check_sheet(args: argparse.Namespace) -> None:
    """Raises UserError where the picture of --sheet is no PNG."""
    if args.sheet and Path(args.sheet).suffix != ".png":
        raise UserError(f"--sheet {args.sheet}: the sheet is a .png")


# Flag -> the numbers that it takes, ends included. Wide: what is outside is a slip of the hand.
RANGES = {
    "epochs": (1, 10**6), "start_epoch": (0, 10**6), "schedule": (0, 10**6),
    "iterations": (1, 10**9), "lr_decay_every": (1, 10**9), "samples_per_epoch": (1, 10**12),
    "batch_size": (1, 10**6), "bn_groups": (1, 10**6), "image_size": (1, 10**4),
    "lr": (0, 10**38), "momentum": (0, 1), "weight_decay": (0, 10**3), "lr_decay": (0, 10**3),
    "moco_dim": (1, 2**16), "moco_k": (1, 10**8), "moco_m": (0, 1), "moco_t": (0, 10**3),
    "nearest_neighbours": (0, 10**8), "nn_weight": (0, 10**3), "nn_from_epoch": (0, 10**6),
    "bank_momentum": (0, 1), "color_strength": (0, 10), "max_unreadable": (0, 1),
    "crop_min": (0, 1), "warmup_epochs": (0, 10**6), "multi_crop": (0, 100),
    "small_size": (1, 10**4), "small_scale": (0, 1), "constrained": (0, 1), "min_iou": (0, 1),
    "max_iou": (0, 1),
    "workers": (0, 1024), "shuffle_buffer": (1, 10**7), "print_freq": (1, 10**9),
    "knn_every": (0, 10**6), "save_every": (0, 10**6), "save_steps": (0, 10**12),
    "knn_bank": (1, 10**9), "keep": (1, 10**6), "eval_every": (1, 10**6), "seed": (0, 2**32 - 1),
    "max_image_pixels": (1, 10**12), "k": (1, 10**9), "temperature": (0, 10**3),
    "train_share": (0, 1), "cost": (0, 10**9),
    "top_k": (1, 10**6), "radius": (1, 10**4), "context": (1, 10**4), "segments": (1, 10**4),
    "world_size": (-1, 10**6), "rank": (-1, 10**6), "gpu": (0, 10**4),
}  # fmt: skip


def check_ranges(args: argparse.Namespace) -> None:
    """Raises UserError for the first flag outside its range; it names the flag."""
    for name, (low, high) in RANGES.items():
        value = getattr(args, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not low <= number <= high:  # true of NaN
                flag = {"k": "neighbours"}.get(name, name.replace("_", "-"))
                raise UserError(
                    f"--{flag} {shown(number)}: it takes numbers from {low:g} to {high:g}"
                )


def as_flags(values: dict, parser: argparse.ArgumentParser, where: str) -> list[str]:
    """{"moco_k": 64, "mlp": True} -> ["--moco-k", "64", "--mlp"].

    Raises UserError for a key that is no flag of `parser`; it names `where` it stands, and the
    nearest flag.
    """
    long_flags = {o[2:] for o in parser._option_string_actions if o.startswith("--")}
    known = long_flags - {"help", "recipe"}
    flags = []
    for key, value in values.items():
        name = one_line(str(key).replace("_", "-"), 60)
        if name not in known:
            raise UserError(f"unknown key {shown(str(key))} in {where}{nearest(name, known)}")
        _check_length(key, value, where)
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _check_length(key: str, value: object, where: str) -> None:
    """Raises UserError for a value that is longer than any flag's; argparse would print all."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict | list) or len(str(item)) > LONGEST_VALUE:
            raise UserError(f"{key} in {where} is {shown(item)}: no flag takes that")
