"""The flags of this folder's commands, their checks, recipes that hold them, and the launch.

What lies deeper gets explicit arguments: an `argparse.Namespace` is passed to commands only.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from moco_det.common.documents import read_mapping, shown
from moco_det.common.errors import CommandParser, UserError, exit_cleanly, nearest, one_line
from moco_det.common.images import MAX_PIXELS
from moco_det.common.installation import yaml_path
from moco_det.common.launch import (
    check_url,
    free_local_url,
    process_group,
    spawn,
    torchrun_ranks,
)
from moco_det.common.processes import workers_per_process
from moco_det.common.weight_sources import OFFICIAL
from pretrain.data.images import Loading
from pretrain.data.shards import is_shards
from pretrain.engine.device import COMPILE
from pretrain.engine.optimization import AMP_DTYPES
from pretrain.engine.trainer import RunSettings
from pretrain.moco import MECHANISMS
from pretrain.moco.losses import LOSSES

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


# -- pretrain/main.py -----------------------------------------------------------------------------


def pretraining_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "Pretrain a ResNet with MoCo, end-to-end or with a memory bank, on unlabelled images.",
        data="ImageFolder root (train/, optionally val/), any folder, or tar shards: "
        "'train-{000000..000146}.tar', '*.tar', a URL, 'pipe:COMMAND'",
        arch="a ResNet; see moco/encoders.py for all",
    )
    add_training_flags(parser)
    add_moco_flags(parser)
    add = parser.add_argument_group("beyond the official code").add_argument
    add("--compile", default="auto", choices=COMPILE,
        help="the encoders; auto: on a GPU, where it works and the run is long enough")  # fmt: skip
    add("--small-stem", action=SWITCH, default=False, help="3x3 stem for 32-pixel images")
    add("--augment-on", default="auto", choices=("auto", "cpu", "device"),
        help="where views get colours, blur and flips: in the loading processes or on the device, "
        "which auto takes where it is a GPU")  # fmt: skip
    add("--knn-every", default=10, type=int, help="epochs between kNN monitors; 0: off")
    add("--knn-bank", **KNN_BANK)
    add("--save-every", default=0, type=int, help="keep every N-th epoch's checkpoint for good")
    add("--keep", default=2, type=int, help="epoch checkpoints to keep")
    add("--samples-per-epoch", default=None, type=int,
        help="tar shards: length of an epoch; default: all --iterations")  # fmt: skip
    add("--shuffle-buffer", default=1000, type=int,
        help="tar shards: samples in each worker's shuffle buffer")  # fmt: skip
    parser.set_defaults(
        output="output", epochs=200, lr=0.03, schedule=[120, 160], weight_decay=1e-4
    )
    return parser


def add_moco_flags(parser: argparse.ArgumentParser) -> None:
    """The official code's flags of the algorithm, and those of the papers' ablations."""
    add = parser.add_argument_group("MoCo").add_argument
    add("--moco-dim", default=128, type=int, help="feature dimension")
    add("--moco-k", default=65536, type=int, help="keys in the queue, or drawn from the bank")
    add("--moco-m", default=0.999, type=float, help="momentum of the key encoder, in [0, 1)")
    add("--moco-t", default=0.07, type=float, help="temperature")
    add("--mlp", action=SWITCH, default=False, help="v2: MLP head")
    add("--aug-plus", action=SWITCH, default=False, help="v2: augmentation with blur")
    add("--cos", action=SWITCH, default=False, help="v2: cosine schedule")
    add("--bn-groups", default=None, type=int,
        help="BN groups per process; default: 32 samples each, if the batch allows")  # fmt: skip

    add = parser.add_argument_group("ablations of the papers").add_argument
    add("--mechanism", default="moco", choices=MECHANISMS, help="where keys come from")
    add("--loss", default="infonce", choices=LOSSES)
    add("--shuffle-bn", action=SWITCH, default=True, help="encode keys in shuffled order")
    add("--bank-momentum", default=0.5, type=float, help="of the memory bank's rows, in [0, 1)")
    add("--color-strength", default=0.5, type=float,
        help="of the colour jitter of --aug-plus; 1 is SimCLR's")  # fmt: skip
    add("--crop-min", default=0.2, type=float, help="least area of a crop; 0.08 is SimCLR's")
    add("--optimizer", default="sgd", choices=("sgd", "lars"), help="LARS as in SimCLR")
    add("--warmup-epochs", default=0, type=int, help="of a learning rate that rises from 0")
    add("--iterations", default=None, type=int, help="length of the run, instead of --epochs")
    add("--lr-decay", default=0.9, type=float, help="factor of --lr-decay-every")
    add("--lr-decay-every", default=None, type=int, metavar="STEPS", help="instead of --schedule")


def parse_pretraining(argv: list[str]) -> argparse.Namespace:
    """Flags over recipe over defaults, checked. Raises UserError."""
    args = _parse(pretraining_parser(), argv)
    counts = ["moco_dim", "moco_k", "keep", "shuffle_buffer", "knn_bank"]
    counts += ["iterations", "lr_decay_every", "samples_per_epoch"]
    _check_training(args)
    _check(args, counts, lambda count: count >= 1, "at least 1")
    _check(args, ["moco_m", "bank_momentum"], lambda value: 0 <= value < 1, "in [0, 1)")
    _check(args, ["moco_t", "lr_decay"], lambda value: value > 0, "above 0")
    _check(args, ["crop_min"], lambda value: 0 < value <= 1, "above 0 and at most 1")
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
    _check_shards(args)
    check_ranges(args)
    return args


def _check_shards(args: argparse.Namespace) -> None:
    """Raises UserError where the flags do not go with the kind of DATA."""
    shards = is_shards(args.data)
    if args.samples_per_epoch and not shards:
        raise UserError("--samples-per-epoch belongs to tar shards: a folder's images are counted")
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


# -- pretrain/linear.py ---------------------------------------------------------------------------


def linear_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "Train a classifier on a pretrained encoder: a linear one on its frozen features, or end "
        "to end.",
        data="ImageFolder root: train/CLASS and val/CLASS; or iNaturalist 2018",
        arch="that of the checkpoint",
    )
    add_training_flags(parser)
    add = parser.add_argument
    add("--pretrained", default="", metavar="WEIGHTS", help=PRETRAINED)
    add("--finetune", action="store_true", help="train all weights, not only a linear classifier")
    add("-e", "--evaluate", action="store_true", help="only evaluate --resume on DATA/val")
    add = parser.add_argument_group("beyond the official code").add_argument
    add("--small-stem", action="store_true", help="as the encoder was pretrained")
    add("--cache-features", action="store_true",
        help="train on features of centre crops, computed once")  # fmt: skip
    add("--bn-groups", default=None, type=int,
        help="--finetune: BN groups per process; default: of about 32 images each")  # fmt: skip
    add("--eval-every", default=1, type=int, help="epochs between validations and checkpoints")
    parser.set_defaults(
        output="output/linear", epochs=100, lr=30.0, schedule=[60, 80], weight_decay=0.0
    )
    return parser


def parse_linear(argv: list[str]) -> argparse.Namespace:
    """Flags over recipe over the protocol's defaults, checked. Raises UserError."""
    parser = linear_parser()
    args = _parse(parser, argv)
    if args.finetune:
        # The papers' values where they give one (lr of A.7, steps of A.6); "the typical ResNet
        # implementation in PyTorch" has momentum 0.9 and weight decay 1e-4 on all parameters.
        parser.set_defaults(output="output/finetune", lr=0.03, schedule=[70, 90], weight_decay=1e-4)
        args = _parse(parser, argv)
    _check_training(args)
    _check(args, ["eval_every"], lambda count: count >= 1, "at least 1")
    if args.finetune and args.cache_features:
        raise UserError("--cache-features belongs to a frozen backbone: drop it, or --finetune")
    if args.bn_groups and not args.finetune:
        raise UserError("--bn-groups belongs to --finetune: frozen BN has no groups")
    check_ranges(args)
    return args


# -- pretrain/knn.py ------------------------------------------------------------------------------


def knn_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "Classify DATA/val by the nearest neighbours in DATA/train on a checkpoint's frozen "
        "features.",
        data="ImageFolder root: train/CLASS and val/CLASS",
        arch="that of the checkpoint",
    )
    add = parser.add_argument
    add("--pretrained", required=True, metavar="WEIGHTS", help=PRETRAINED)
    add("-k", "--neighbours", default=200, type=int, dest="k", help="how many neighbours vote")
    add("-t", "--temperature", "--sigma", default=0.07, type=float,
        help="a neighbour's vote is exp(cosine / this)")  # fmt: skip
    add("--knn-bank", **KNN_BANK)
    add("--small-stem", action="store_true", help="as the encoder was pretrained")
    add("--seed", default=0, type=int, help="of --pretrained random's weights, and of --knn-bank")
    add("--output", default=None, metavar="FILE", help="write the accuracy as JSON as well")
    return parser


def parse_knn(argv: list[str]) -> argparse.Namespace:
    """Flags, checked. Raises UserError."""
    args = knn_parser().parse_args(argv)
    if args.k < 1 or args.image_size < 1:
        raise UserError("--neighbours and --image-size must be at least 1")
    _check(args, ["max_image_pixels", "knn_bank"], lambda count: count >= 1, "at least 1")
    _check(args, ["temperature"], lambda value: value > 0, "above 0")
    check_ranges(args)
    return args


# -- pretrain/embed.py ----------------------------------------------------------------------------


def embed_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "Write a checkpoint's features of any images, with their names, and a sheet of nearest "
        "neighbours.",
        data="any folder of images, or tar shards as for main.py",
        arch="that of the checkpoint",
    )
    add = parser.add_argument
    add("--pretrained", required=True, metavar="WEIGHTS", help=PRETRAINED)
    add("--output", required=True, metavar="FILE", help="features and names: .npz or .parquet")
    add("--sheet", metavar="FILE.png", help="draw some images, each with those nearest to it")
    add("--queries", default=12, type=int, help="rows of the sheet")
    add("-k", "--neighbours", default=8, type=int, dest="k", help="of each row of the sheet")
    add("--small-stem", action="store_true", help="as the encoder was pretrained")
    add("--amp", default="none", choices=AMP_DTYPES, help="mixed precision of the encoder")
    add("--seed", default=0, type=int, help="of the sheet's rows, and of --pretrained random")
    add("--max-unreadable", default=0.01, type=float, help="share of the images that may be")
    parser.set_defaults(batch_size=1)
    return parser


def parse_embed(argv: list[str]) -> argparse.Namespace:
    """Flags, checked. Raises UserError."""
    args = embed_parser().parse_args(argv)
    _check(args, ["k", "queries", "image_size", "max_image_pixels"], lambda n: n >= 1, "at least 1")
    if Path(args.output).suffix not in (".npz", ".parquet"):
        raise UserError(f"--output {args.output}: features are written as .npz or .parquet")
    if args.sheet and Path(args.sheet).suffix != ".png":
        raise UserError(f"--sheet {args.sheet}: the sheet is a .png")
    check_ranges(args)
    return args


# -- what they share ------------------------------------------------------------------------------


def _parser(description: str, data: str, arch: str) -> argparse.ArgumentParser:
    """The flags of every command; `data` and `arch` are help texts."""
    parser = CommandParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("data", metavar="DATA", help=data)
    add("-a", "--arch", default="resnet50", help=arch)
    add("-j", "--workers", default=len(os.sched_getaffinity(0)), type=int,
        help="data loading processes on this node")  # fmt: skip
    add("--image-size", default=224, type=int, help="side of a view in pixels")
    add("--max-image-pixels", default=MAX_PIXELS, type=int, help="larger image files are refused")
    add = parser.add_argument_group("launch, as in the official code; or use torchrun").add_argument
    add("--world-size", default=-1, type=int, help="nodes, or processes without the flag below")
    add("--rank", default=-1, type=int, help="of this node, or process")
    add("--dist-url", default=None, help="tcp://HOST:PORT, or env://")
    add("--dist-backend", default="nccl", help="on GPUs; a CPU run always uses gloo")
    add("--gpu", default=None, type=int, help="the one GPU to use")
    add("--multiprocessing-distributed", action="store_true", help="one process per GPU")
    return parser


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of main_moco.py and main_lincls.py; our commands set the defaults that differ."""
    add = parser.add_argument
    add("--recipe", type=yaml_path, metavar="YAML",
        help="flags by their long names; a flag given beside it wins")  # fmt: skip
    add("--output", metavar="DIR", help="folder for checkpoints and logs")
    add("--epochs", type=int, help="length of the run")
    add("--start-epoch", default=0, type=int, help="where a new run begins in its schedule")
    add("-b", "--batch-size", default=256, type=int, help="global: of all processes together")
    add("--lr", "--learning-rate", type=float, dest="lr",
        help="for a global batch of 256; not scaled automatically")  # fmt: skip
    add("--schedule", nargs="*", type=int, help="epochs to divide lr by 10")
    add("--momentum", default=0.9, type=float, help="of SGD")
    add("--wd", "--weight-decay", type=float, dest="weight_decay", help="on all parameters")
    add("-p", "--print-freq", default=10, type=int, help="steps between two log lines")
    add("--resume", default="", metavar="PATH|auto", help="auto: --output's last one, if any")
    add("--restart-epoch", action="store_true",
        help="resume at the beginning of the epoch, on whatever images")  # fmt: skip
    add("--overwrite", action="store_true", help="delete the run that --output holds")
    add("--seed", default=None, type=int, help="of all draws; kernels of a GPU still round freely")
    add("--deterministic", action=SWITCH, default=False,
        help="on a GPU the same bits each time; steps take about half as long again")  # fmt: skip
    add("--amp", default="auto", choices=["auto", *AMP_DTYPES],
        help="mixed precision of the encoder; auto: a resumed run's own, else bf16 on GPUs that "
        "have it")  # fmt: skip
    add("--save-steps", default=0, type=int, help="also save the last checkpoint every N steps")
    add("--max-unreadable", default=0.01, type=float, help="fraction that may be unreadable")


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Flags over recipe over defaults; the recipe is read as flags, which argparse checks."""
    args = parser.parse_args(argv)
    if args.recipe:
        flags = as_flags(read_mapping(args.recipe, "--recipe"), parser, f"--recipe {args.recipe}")
        recipe = parser.parse_args([*flags, "--", args.data])
        parser.set_defaults(**vars(recipe))
        args = parser.parse_args(argv)
    return args


def loading(args: argparse.Namespace, device: torch.device, seed: int) -> Loading:
    """What the flags of a training command say of its batches."""
    workers = workers_per_process(args.workers)
    return Loading(args.batch_size, seed, workers, device.type == "cuda", args.max_unreadable)


def run_settings(args: argparse.Namespace, seed: int) -> RunSettings:
    """What the flags of a training command say of its length, its reports and its output."""
    return RunSettings(
        output=Path(args.output),
        arch=args.arch,
        config=vars(args) | {"seed": seed},
        batch_size=args.batch_size,
        epochs=args.epochs,
        start_epoch=args.start_epoch,
        print_freq=args.print_freq,
        save_steps=args.save_steps,
    )


def _check_training(args: argparse.Namespace) -> None:
    """What both commands that train ask of their flags. Raises UserError."""
    _check(args, TRAINING_COUNTS, lambda count: count >= 1, "at least 1")
    if args.resume and args.overwrite:
        raise UserError("--resume goes on from a run and --overwrite deletes it: pass one of them")
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch}: there are --epochs {args.epochs}")


def _check(
    args: argparse.Namespace, names: list[str], holds: Callable[[float], bool], what: str
) -> None:
    """Raises UserError for a flag that is given, and is not `what` `holds` for."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise UserError(f"--{name.replace('_', '-')} must be {what}")


# Flag -> the numbers that it takes, ends included. Wide: what is outside is a slip of the hand.
RANGES = {
    "epochs": (1, 10**6), "start_epoch": (0, 10**6), "schedule": (0, 10**6),
    "iterations": (1, 10**9), "lr_decay_every": (1, 10**9), "samples_per_epoch": (1, 10**12),
    "batch_size": (1, 10**6), "bn_groups": (1, 10**6), "image_size": (1, 10**4),
    "lr": (0, 10**38), "momentum": (0, 1), "weight_decay": (0, 10**3), "lr_decay": (0, 10**3),
    "moco_dim": (1, 2**16), "moco_k": (1, 10**8), "moco_m": (0, 1), "moco_t": (0, 10**3),
    "bank_momentum": (0, 1), "color_strength": (0, 10), "max_unreadable": (0, 1),
    "crop_min": (0, 1), "warmup_epochs": (0, 10**6),
    "workers": (0, 1024), "shuffle_buffer": (1, 10**7), "print_freq": (1, 10**9),
    "knn_every": (0, 10**6), "save_every": (0, 10**6), "save_steps": (0, 10**12),
    "knn_bank": (1, 10**9), "keep": (1, 10**6), "eval_every": (1, 10**6), "seed": (0, 2**32 - 1),
    "max_image_pixels": (1, 10**12), "k": (1, 10**9), "temperature": (0, 10**3),
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


# -- launch ---------------------------------------------------------------------------------------


def launch(run: Callable, parse: Callable[[list[str]], argparse.Namespace]) -> None:
    """Call `run(parse(arguments), device)` in every process that the flags or torchrun ask for.

    - torchrun: the processes exist; the environment says who is who.
    - `--multiprocessing-distributed`: one process per GPU of this node (one on a CPU), where
      `--world-size` counts nodes and `--rank` is this node's, as in facebookresearch/moco.
    - `--world-size N --rank R`: this is process R of N.
    - otherwise a single process.

    The process ends with the exit codes of `moco_det.common.errors`.
    """
    with exit_cleanly():
        args = parse(sys.argv[1:])
        if args.dist_url == "env://" or "TORCHELASTIC_RUN_ID" in os.environ:
            _join(run, args, "env://", *torchrun_ranks())
            return
        check_launch(args)
        if args.multiprocessing_distributed:
            local = torch.cuda.device_count() or 1
            nodes, node = max(args.world_size, 1), max(args.rank, 0)
            url = args.dist_url or free_local_url()
            ranks = local, node * local, nodes * local
            spawn(_run_spawned, (run, args), *ranks, url, args.dist_backend)
        elif args.world_size > 1:
            _join(run, args, args.dist_url, args.rank, args.world_size, args.gpu or 0)
        else:
            run(args, _device(args.gpu or 0))


def check_launch(args: argparse.Namespace) -> None:
    """Raises UserError for flags that no launch can follow, before any process starts."""
    if args.gpu is not None and not torch.cuda.is_available():
        raise UserError(f"--gpu {args.gpu}: torch finds no GPU; without the flag, the CPU is used")
    if args.gpu is not None and not 0 <= args.gpu < torch.cuda.device_count():
        raise UserError(f"--gpu {args.gpu}: there are {torch.cuda.device_count()}, counted from 0")
    if args.rank >= max(args.world_size, 1):
        raise UserError(f"--rank {args.rank}: ranks go from 0 to --world-size - 1")
    if args.world_size > 1:
        if args.rank < 0:
            raise UserError(
                f"--world-size {args.world_size} needs --rank, the number of this node (with "
                "--multiprocessing-distributed) or process"
            )
        if not args.dist_url:
            raise UserError(
                f"--world-size {args.world_size} needs --dist-url tcp://HOST:PORT, the address of "
                "rank 0"
            )
    if args.dist_url and (args.world_size > 1 or args.multiprocessing_distributed):
        check_url(args.dist_url, hosted_here=args.rank <= 0)


def _join(run: Callable, args, url: str, rank: int, world_size: int, local_rank: int) -> None:
    """Become process `rank` of `world_size` and run."""
    device = _device(local_rank)
    group = process_group(url, rank, world_size, local_rank, args.dist_backend)
    with group if world_size > 1 else contextlib.nullcontext():
        run(args, device)


def _run_spawned(run: Callable, args) -> None:
    run(args, _device(torch.cuda.current_device() if torch.cuda.is_available() else 0))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"GPU {local_rank} asked for; there are {torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
