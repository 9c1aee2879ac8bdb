"""The flags of pretrain/main.py: the official code's, those of the papers' ablations, and ours."""

import argparse
import os
from os import PathLike
from typing import Any, NoReturn

from moco_det.common.documents import shown
from moco_det.common.errors import UserError, nearest
from pretrain.data import is_shards
from pretrain.flags.common import (
    KNN_BANK,
    SWITCH,
    add_training_flags,
    base_parser,
    check,
    check_ranges,
    check_training,
    parse_with_recipe,
)
from pretrain.flags.views import add_view_flags, check_views

# The names of `device.COMPILE`, `moco.MECHANISMS` and `losses.LOSSES`: see `common.AMP`.
COMPILE = ("auto", "on", "off")
MECHANISMS = ("moco", "end-to-end", "memory-bank")
LOSSES = ("infonce", "nce")


def pretraining_parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "Pretrain a ResNet with MoCo, end-to-end or with a memory bank, on unlabelled images.",
        data="ImageFolder root (train/, optionally val/), any folder, or tar shards: "
        "'train-{000000..000146}.tar', '*.tar', a URL, 'pipe:COMMAND'",
        arch="a ResNet; see moco/encoders.py for all",
    )
    add_training_flags(parser)
    add_moco_flags(parser)
    add_view_flags(parser)
    add = parser.add_argument_group("beyond the official code").add_argument
    add("--compile", default="auto", choices=COMPILE,
        help="compile the encoders; auto: on a GPU, where it works and the run is long "
        "enough")  # fmt: skip
    add("--small-stem", action=SWITCH, default=False,
        help="3x3 stem of stride 1 for 32-pixel images")  # fmt: skip
    add("--augment-on", default="auto", choices=("auto", "cpu", "device"),
        help="where views get colours, blur and flips: in the loading processes or on the device, "
        "which auto takes where it is a GPU")  # fmt: skip
    add("--knn-every", default=10, type=int, help="epochs between kNN monitors; 0: off")
    add("--knn-bank", **KNN_BANK)
    add("--save-every", default=0, type=int,
        help="keep every N-th epoch's checkpoint for good; 0: none")  # fmt: skip
    add("--keep", default=2, type=int, help="number of epoch checkpoints to keep")
    add("--list", metavar="FILE",
        help="text file of the images to train on, one a line, relative to DATA: see subset.py; "
        "default: all of DATA")  # fmt: skip
    add("--samples-per-epoch", default=None, type=int,
        help="tar shards: length of an epoch in samples; default: all --iterations")  # fmt: skip
    add("--shuffle-buffer", default=1000, type=int,
        help="tar shards: samples in each worker's shuffle buffer")  # fmt: skip
    parser.set_defaults(
        output="output", epochs=200, lr=0.03, schedule=[120, 160], weight_decay=1e-4
    )
    return parser


def add_moco_flags(parser: argparse.ArgumentParser) -> None:
    """The official code's flags of the algorithm, and those of the papers' ablations."""
    add = parser.add_argument_group("MoCo").add_argument
    add("--moco-dim", default=128, type=int, help="dimension of the features")
    add("--moco-k", default=65536, type=int, help="keys in the queue, or drawn from the bank")
    add("--moco-m", default=0.999, type=float, help="momentum of the key encoder, in [0, 1)")
    add("--moco-t", default=0.07, type=float, help="temperature of the logits")
    add("--mlp", action=SWITCH, default=False, help="v2: MLP as projection head")
    add("--aug-plus", action=SWITCH, default=False, help="v2: augmentation with blur")
    add("--cos", action=SWITCH, default=False, help="v2: cosine schedule")
    add("--bn-groups", default=None, type=int,
        help="BN groups per process; default: 32 samples each, if the batch allows")  # fmt: skip

    add = parser.add_argument_group(
        'nearest neighbours of "Revisiting Contrastive Methods"'
    ).add_argument
    add("--nearest-neighbours", default=0, const=20, nargs="?", type=int, metavar="K",
        help="keys of the queue that are positives too; 20 without a number, 0: off")  # fmt: skip
    add("--nn-weight", default=0.4, type=float, help="of their loss, beside that of the own key")
    add("--nn-from-epoch", default=0, type=int, help="epochs that their loss does not count in")

    add = parser.add_argument_group("ablations of the papers").add_argument
    add("--mechanism", default="moco", choices=MECHANISMS, help="where keys come from")
    add("--loss", default="infonce", choices=LOSSES, help="of keys and queries")
    add("--shuffle-bn", action=SWITCH, default=True, help="encode keys in shuffled order")
    add("--bank-momentum", default=0.5, type=float, help="of the memory bank's rows, in [0, 1)")
    add("--color-strength", default=0.5, type=float,
        help="factor on the colour jitter of --aug-plus; 1 is SimCLR's")  # fmt: skip
    add("--crop-min", default=0.2, type=float,
        help="least area of a crop, as share of its image; 0.08 is SimCLR's")  # fmt: skip
    add("--optimizer", default="sgd", choices=("sgd", "lars"), help="lars: as in SimCLR")
    add("--warmup-epochs", default=0, type=int, help="epochs of a learning rate that rises from 0")
    add(
        "--iterations", default=None, type=int, help="length of the run in steps; default: --epochs"
    )
    add("--lr-decay", default=0.9, type=float,
        help="factor on the learning rate at --lr-decay-every")  # fmt: skip
    add("--lr-decay-every", default=None, type=int, metavar="STEPS",
        help="steps between two decays of the learning rate; default: --schedule")  # fmt: skip


def parse_pretraining(
    argv: list[str], parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """Flags over recipe over defaults, checked. Raises UserError."""
    args = parse_with_recipe(parser or pretraining_parser(), argv)
    counts = ["moco_dim", "moco_k", "keep", "shuffle_buffer", "knn_bank"]
    counts += ["iterations", "lr_decay_every", "samples_per_epoch"]
    check_training(args)
    check(args, counts, lambda count: count >= 1, "at least 1")
    check(args, ["moco_m", "bank_momentum"], lambda value: 0 <= value < 1, "in [0, 1)")
    check(args, ["moco_t", "lr_decay"], lambda value: value > 0, "above 0")
    check(args, ["nearest_neighbours", "nn_from_epoch"], lambda count: count >= 0, "at least 0")
    check(args, ["nn_weight"], lambda value: value >= 0, "at least 0")
    if args.warmup_epochs >= args.epochs and not args.iterations:
        raise UserError(f"--warmup-epochs {args.warmup_epochs}: there are --epochs {args.epochs}")
    if args.cos and args.lr_decay_every:
        raise UserError("--cos and --lr-decay-every are two schedules: pass one of them")
    if args.deterministic and args.compile == "on":
        raise UserError(
            "--deterministic wants the same kernels each time, and --compile on whatever it finds "
            "the fastest: pass one of them"
        )
    if args.color_strength != 0.5 and not args.aug_plus:
        raise UserError("--color-strength belongs to v2's augmentation: pass --aug-plus as well")
    _check_neighbours(args)
    _check_shards(args)
    check_views(args)
    check_ranges(args)
    return args


def _check_neighbours(args: argparse.Namespace) -> None:
    """Raises UserError where there is no queue to find neighbours in, or it is too short."""
    wanted = args.nearest_neighbours
    if not wanted:
        if (args.nn_weight, args.nn_from_epoch) != (0.4, 0):
            raise UserError(
                "--nn-weight and --nn-from-epoch belong to kNN-MoCo: pass --nearest-neighbours too"
            )
    elif args.mechanism != "moco":
        raise UserError(
            f"--nearest-neighbours are found in a queue of keys, which --mechanism "
            f"{args.mechanism} has not: drop one of the two"
        )
    elif wanted > args.moco_k:
        raise UserError(
            f"--nearest-neighbours {wanted}: there are --moco-k {args.moco_k} keys in the queue"
        )


def _check_shards(args: argparse.Namespace) -> None:
    """Raises UserError where the flags do not go with the kind of DATA."""
    shards = is_shards(args.data)
    if args.samples_per_epoch and not shards:
        raise UserError("--samples-per-epoch belongs to tar shards: a folder's images are counted")
    if args.list and shards:
        raise UserError("--list is about image files: pass a folder as DATA, not tar shards")
    if shards and args.mechanism == "memory-bank":
        raise UserError(
            "--mechanism memory-bank keeps a feature for every place in a folder; the samples "
            "of tar shards have no such places: pass a folder of images as DATA"
        )
    if shards and not (args.samples_per_epoch or args.iterations):
        raise UserError(
            "tar shards do not tell how many samples they hold: pass --samples-per-epoch N "
            "(1281167 for ImageNet) with --epochs, or the length of the run as --iterations N"
        )
    if args.samples_per_epoch and args.samples_per_epoch < args.batch_size:
        raise UserError("--samples-per-epoch must be at least --batch-size")


# -- from Python ----------------------------------------------------------------------------------

# Of the command alone: a program's processes are there already, or those of torchrun.
LAUNCH = {"world_size", "rank", "dist_url", "dist_backend", "gpu", "multiprocessing_distributed"}


def pretraining_keywords() -> dict[str, Any]:
    """The flags as names of Python's, and their defaults."""
    parser = pretraining_parser()
    names = {action.dest for action in parser._actions if action.option_strings}
    names -= {"help", *LAUNCH}
    return {a.dest: parser.get_default(a.dest) for a in parser._actions if a.dest in names}


def parse_keywords(data: str | PathLike, given: dict[str, Any]) -> argparse.Namespace:
    """What the same flags would give; None stands for the default. Raises UserError."""
    parser = pretraining_parser()
    parser.error = _refuse  # in place of an exit
    known = pretraining_keywords().keys()
    words = []
    for name, value in given.items():
        if name not in known:
            launched = f"; torchrun starts the processes of {name}" if name in LAUNCH else ""
            raise UserError(f"unknown argument {name}{launched or nearest(name, known)}")
        words += _flag(next(a for a in parser._actions if a.dest == name), value)
    return parse_pretraining([*words, "--", os.fspath(data)], parser)


def _flag(action: argparse.Action, value: Any) -> list[str]:
    """The words of a command that give a flag this value."""
    name = next(option for option in action.option_strings if option.startswith("--"))
    if value is None:
        return []
    if action.nargs == 0:  # one that takes no value: it stands there, or its opposite if it has one
        if not isinstance(value, bool):
            raise UserError(f"{name} is {shown(value)}: it takes True or False")
        return [name] if value else [o for o in action.option_strings if o.startswith("--no-")]
    if value is True and action.nargs == "?":  # the flag alone
        return [name]
    if isinstance(value, list | tuple):
        if action.nargs not in ("*", "+", len(value)):
            wanted = f"{action.nargs} values" if isinstance(action.nargs, int) else "one value"
            raise UserError(f"{name} is {shown(value)}: it takes {wanted}")
        return [name, *map(str, value)]
    return [f"{name}={value}"]


def _refuse(message: str) -> NoReturn:
    raise UserError(message)
