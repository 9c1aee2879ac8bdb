"""The flags of this folder's commands, the recipes that hold them, and the launch they ask for."""

import argparse
import difflib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import yaml

from moco_det.common.errors import UserError, exit_cleanly
from moco_det.common.launch import free_local_url, process_group, spawn
from pretrain.engine.optimization import AMP_DTYPES
from pretrain.moco.losses import LOSSES
from pretrain.moco.mechanisms import MECHANISMS


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Pretrain a ResNet with MoCo v1 or v2, or the mechanisms beside it, on "
        "unlabelled images.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("data", metavar="DATA",
        help="ImageFolder root (train/, optionally val/), any folder, or tar shards: "
        "'train-{000000..000146}.tar', '*.tar', a URL, 'pipe:COMMAND'")  # fmt: skip
    add("--recipe", metavar="YAML", help="flags by their long names; a flag given beside it wins")
    add("--output", default="output", metavar="DIR", help="where everything is written")
    add("-a", "--arch", default="resnet50", help="a ResNet; see encoders.py for all")
    add("-j", "--workers", default=len(os.sched_getaffinity(0)), type=int,
        help="data loading processes on this node")  # fmt: skip
    add("--epochs", default=200, type=int)
    add("--start-epoch", default=0, type=int)
    add("-b", "--batch-size", default=256, type=int, help="global, whatever the launch")
    add("--lr", "--learning-rate", default=0.03, type=float, dest="lr")
    add("--schedule", default=[120, 160], nargs="*", type=int, help="epochs of a drop by 10")
    add("--momentum", default=0.9, type=float, help="of SGD")
    add("--wd", "--weight-decay", default=1e-4, type=float, dest="weight_decay")
    add("-p", "--print-freq", default=10, type=int, help="steps between two reports")
    add("--resume", default="", metavar="PATH|auto", help="auto: DIR's last one, if there is one")
    add("--seed", default=None, type=int, help="also selects deterministic cuDNN algorithms")

    add_launch_flags(parser)
    add_moco_flags(parser)
    add_own_flags(parser)
    return parser


def add_moco_flags(parser: argparse.ArgumentParser) -> None:
    """The official code's flags of the algorithm, and those of the papers' ablations."""
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("MoCo").add_argument
    add("--moco-dim", default=128, type=int, help="feature dimension")
    add("--moco-k", default=65536, type=int, help="length of the queue, or draws from the bank")
    add("--moco-m", default=0.999, type=float, help="momentum of the key encoder, in [0, 1)")
    add("--moco-t", default=0.07, type=float, help="temperature")
    add("--mlp", action=switch, default=False, help="v2: MLP head")
    add("--aug-plus", action=switch, default=False, help="v2: augmentation with blur")
    add("--cos", action=switch, default=False, help="v2: cosine schedule")
    add("--bn-groups", default=None, type=int,
        help="BN groups per process; default: 32 samples each, if the batch allows")  # fmt: skip

    add = parser.add_argument_group("ablations of the papers").add_argument
    add("--mechanism", default="moco", choices=MECHANISMS, help="where keys come from")
    add("--loss", default="infonce", choices=LOSSES)
    add("--shuffle-bn", action=switch, default=True, help="encode keys in shuffled order")
    add("--bank-momentum", default=0.5, type=float, help="of the memory bank's rows, in [0, 1)")
    add("--color-strength", default=0.5, type=float,
        help="of the colour jitter of --aug-plus; 1 is SimCLR's")  # fmt: skip
    add("--iterations", default=None, type=int, help="length of the run, instead of --epochs")
    add("--lr-decay", default=0.9, type=float, help="factor of --lr-decay-every")
    add("--lr-decay-every", default=None, type=int, metavar="STEPS", help="instead of --schedule")


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """What the official code has no flags for."""
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("beyond the official code").add_argument
    add("--image-size", default=224, type=int, help="side of a view in pixels")
    add("--small-stem", action=switch, default=False, help="3x3 stem for 32-pixel images")
    add("--amp", default="none", choices=AMP_DTYPES, help="mixed precision")
    add("--knn-every", default=10, type=int, help="epochs between kNN monitors; 0: off")
    add("--save-every", default=0, type=int, help="keep every N-th epoch's checkpoint for good")
    add("--save-steps", default=0, type=int, help="also save the last checkpoint every N steps")
    add("--keep", default=2, type=int, help="epoch checkpoints to keep")
    add("--max-unreadable", default=0.01, type=float, help="share of images that may be corrupt")
    add("--samples-per-epoch", default=None, type=int,
        help="tar shards: length of an epoch; default: all --iterations")  # fmt: skip
    add("--shuffle-buffer", default=1000, type=int,
        help="tar shards: samples that a worker holds back and draws from")  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags over recipe over defaults, checked. Raises UserError."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.recipe:
        recipe = vars(parser.parse_args([*recipe_flags(args.recipe, parser), "--", args.data]))
        parser.set_defaults(**recipe)
        args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raises UserError for values that argparse cannot tell from good ones."""
    counts = ["epochs", "batch_size", "print_freq", "moco_dim", "moco_k", "image_size", "keep"]
    counts.append("shuffle_buffer")
    optional = ("iterations", "lr_decay_every", "samples_per_epoch")
    counts += [name for name in optional if getattr(args, name) is not None]
    for name in counts:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("moco_m", "bank_momentum"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be in [0, 1)")
    for name in ("moco_t", "lr_decay"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0")
    if args.cos and args.lr_decay_every:
        raise UserError("--cos and --lr-decay-every are two schedules: pass one of them")
    if args.color_strength != 0.5 and not args.aug_plus:
        raise UserError("--color-strength belongs to v2's augmentation: pass --aug-plus as well")


def recipe_flags(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """The recipe as command-line flags, so that argparse checks both alike. Raises UserError."""
    return as_flags(read_yaml(path, "--recipe"), parser, f"--recipe {path}")


def read_yaml(path: str | Path, what: str) -> dict:
    """The mapping in a YAML file, which is a command's `what`. Raises UserError."""
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} {path} must map keys to values")
    return content


def as_flags(values: dict, parser: argparse.ArgumentParser, where: str) -> list[str]:
    """{"moco_k": 64, "mlp": True} -> ["--moco-k", "64", "--mlp"].

    Raises UserError for a key that is no flag of `parser`; it names `where` it stands, and the
    nearest flag.
    """
    long_flags = {o[2:] for o in parser._option_string_actions if o.startswith("--")}
    known = long_flags - {"help", "recipe"}
    flags = []
    for key, value in values.items():
        name = str(key).replace("_", "-")
        if name not in known:
            raise UserError(f"unknown key '{key}' in {where}{nearest(name, known)}")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" where one of `known` is close to `name`, else nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


# -- launch ---------------------------------------------------------------------------------------


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `launch` reads."""
    launching = parser.add_argument_group("launch, as in the official code; or use torchrun")
    add = launching.add_argument
    add("--world-size", default=-1, type=int, help="nodes, or processes without the flag below")
    add("--rank", default=-1, type=int, help="of this node, or process")
    add("--dist-url", default=None, help="tcp://HOST:PORT, or env://")
    add("--dist-backend", default="nccl", help="on GPUs; a CPU run always uses gloo")
    add("--gpu", default=None, type=int, help="the one GPU to use")
    add("--multiprocessing-distributed", action="store_true", help="one process per GPU")


def launch(run: Callable, parse: Callable[[], argparse.Namespace]) -> None:
    """Call `run(args, device)` in every process that the flags or torchrun ask for, then exit.

    - torchrun: the processes exist; the environment says who is who.
    - `--multiprocessing-distributed`: one process per GPU of this node (one on a CPU), where
      `--world-size` counts nodes and `--rank` is this node's, as in facebookresearch/moco.
    - `--world-size N --rank R`: this is process R of N.
    - otherwise a single process.
    """
    with exit_cleanly():
        args = parse()
        if args.dist_url == "env://" or "TORCHELASTIC_RUN_ID" in os.environ:
            ranks = (int(os.environ.get(key, default)) for key, default in TORCHRUN)
            _join(run, args, "env://", *ranks)
        elif args.multiprocessing_distributed:
            local = torch.cuda.device_count() or 1
            nodes, node = max(args.world_size, 1), max(args.rank, 0)
            url = args.dist_url or free_local_url()
            processes = (local, node * local, nodes * local)
            spawn(_run_spawned, (run, args), *processes, url, args.dist_backend)
        elif args.world_size > 1:
            if args.rank < 0:
                raise UserError("--world-size above 1 needs --rank, this process's number")
            _join(run, args, args.dist_url, args.rank, args.world_size, args.gpu or 0)
        else:
            run(args, _device(args.gpu or 0))


TORCHRUN = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def _join(run: Callable, args, url: str, rank: int, world_size: int, local_rank: int) -> None:
    """Become process `rank` of `world_size` and run."""
    device = _device(local_rank)
    if world_size == 1:
        run(args, device)
    else:
        with process_group(url, rank, world_size, local_rank, args.dist_backend):
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
