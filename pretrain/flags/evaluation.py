"""The flags of linear.py, knn.py, voc_svm.py, summary.py and embed.py, which judge a checkpoint."""

import argparse
from collections.abc import Callable
from pathlib import Path

from moco_det.common.errors import UserError
from pretrain.flags.common import (
    AMP,
    KNN_BANK,
    PRETRAINED,
    add_training_flags,
    base_parser,
    check,
    check_ranges,
    check_sheet,
    check_training,
    parse_with_recipe,
)

# Of `data.benchmarks` and `evaluation.svm`, which take longer to import than --help may.
FOLDERS = "folders"
DATASETS = (FOLDERS, "cifar10", "food101", "pets", "places365", "cars", "sun397")
COST, COSTS, FOLDS = 0.5, (0.01, 0.1, 1.0, 2, 5, 10, 15, 20, 50, 100, 1000), 3
STAGES = ("knn", "linear", "finetune_1", "finetune_10", "finetune_100")  # of a summary


def linear_parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "Train a classifier on a pretrained encoder: a linear one on its frozen features, or end "
        "to end.",
        data="ImageFolder root: train/CLASS and val/CLASS; iNaturalist 2018; or as --dataset says",
        arch="that of the checkpoint",
    )
    add_training_flags(parser)
    add = parser.add_argument
    add("--pretrained", default="", metavar="WEIGHTS",
        help=f"{PRETRAINED}; no default, but --evaluate needs none")  # fmt: skip
    add("--finetune", action="store_true", help="train all weights, not only a linear classifier")
    add("-e", "--evaluate", action="store_true", help="only evaluate --resume on DATA/val")
    add = parser.add_argument_group("beyond the official code").add_argument
    add("--small-stem", action="store_true", help="as the encoder was pretrained")
    add("--cache-features", action="store_true",
        help="train on features of centre crops, computed once")  # fmt: skip
    add("--bn-groups", default=None, type=int,
        help="--finetune: BN groups per process; default: of about 32 images each")  # fmt: skip
    add("--eval-every", default=1, type=int, help="epochs between validations and checkpoints")
    add_dataset_flags(add)
    add("--list", default=None, metavar="FILE",
        help="train on the images of this list alone: paths in train, or file names; default: "
        "all")  # fmt: skip
    add("--train-share", default=None, type=float, metavar="SHARE",
        help="train on this share of each class's images, drawn by the seed; default: all of "
        "them")  # fmt: skip
    parser.set_defaults(
        output="output/linear", epochs=100, lr=30.0, schedule=[60, 80], weight_decay=0.0
    )
    return parser


def parse_linear(argv: list[str]) -> argparse.Namespace:
    """Flags over recipe over the protocol's defaults, checked. Raises UserError."""
    parser = linear_parser()
    args = parse_with_recipe(parser, argv)
    if args.finetune:
        # The papers' values where they give one (lr of A.7, steps of A.6); "the typical ResNet
        # implementation in PyTorch" has momentum 0.9 and weight decay 1e-4 on all parameters.
        parser.set_defaults(output="output/finetune", lr=0.03, schedule=[70, 90], weight_decay=1e-4)
        args = parse_with_recipe(parser, argv)
    check_training(args)
    check(args, ["eval_every"], lambda count: count >= 1, "at least 1")
    if args.finetune and args.cache_features:
        raise UserError("--cache-features belongs to a frozen backbone: drop it, or --finetune")
    if args.bn_groups and not args.finetune:
        raise UserError("--bn-groups belongs to --finetune: frozen BN has no groups")
    if args.list and args.train_share:
        raise UserError("--list and --train-share both say what is trained on: pass one of them")
    check(args, ["train_share"], lambda share: 0 < share <= 1, "above 0 and at most 1")
    check_ranges(args)
    return args


def add_dataset_flags(add: Callable) -> None:
    add("--dataset", default=FOLDERS, choices=DATASETS,
        help="what DATA holds: class folders (or iNaturalist 2018), or a data set as torchvision "
        "lays it out, evaluated on its official test split")  # fmt: skip
    add("--download", action="store_true", help="have torchvision fetch --dataset into DATA")


def knn_parser() -> argparse.ArgumentParser:
    parser = base_parser(
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
    add_dataset_flags(add)
    add("--small-stem", action="store_true", help="as the encoder was pretrained")
    add("--seed", default=0, type=int, help="of --pretrained random's weights, and of --knn-bank")
    add("--output", default=None, metavar="FILE",
        help="write the accuracy as JSON as well; default: no file")  # fmt: skip
    return parser


def parse_knn(argv: list[str]) -> argparse.Namespace:
    """Flags, checked. Raises UserError."""
    args = knn_parser().parse_args(argv)
    if args.k < 1 or args.image_size < 1:
        raise UserError("--neighbours and --image-size must be at least 1")
    check(args, ["max_image_pixels", "knn_bank"], lambda count: count >= 1, "at least 1")
    check(args, ["temperature"], lambda value: value > 0, "above 0")
    check_ranges(args)
    return args


def voc_svm_parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "Classify VOC 2007 by linear SVMs on a checkpoint's frozen features.",
        data="VOC2007: ImageSets/ and JPEGImages/, in it, in VOC2007/ or in VOCdevkit/VOC2007/",
        arch="that of the checkpoint",
    )
    add = parser.add_argument
    add("--pretrained", required=True, metavar="WEIGHTS", help=PRETRAINED)
    add("--cost", default=COST, type=float, metavar="C", help="of every SVM")
    add("--cross-validate", action="store_true",
        help=f"choose each class's cost among {', '.join(map(str, COSTS))} by {FOLDS} folds of "
        "train, as VISSL does, instead of --cost")  # fmt: skip
    add("--difficult", default="ignored", choices=("ignored", "negative"),
        help="images with difficult objects of a class alone: left out, as VOC says, or negatives, "
        "as the paper's public code has them")  # fmt: skip
    add("--train-split", default="trainval", help="to train on")
    add("--test-split", default="test", help="to evaluate on")
    add("--small-stem", action="store_true", help="as the encoder was pretrained")
    add("--amp", default="none", choices=AMP, help="mixed precision of the encoder")
    add("--seed", default=0, type=int, help="of the solver, and of --pretrained random's weights")
    add("--max-unreadable", default=0.01, type=float, help="share of the images that may be")
    add("--output", default=None, metavar="FILE",
        help="write mAP and APs as JSON as well; default: no file")  # fmt: skip
    parser.set_defaults(batch_size=1)
    return parser


def parse_voc_svm(argv: list[str]) -> argparse.Namespace:
    """Flags, checked. Raises UserError."""
    args = voc_svm_parser().parse_args(argv)
    check(args, ["image_size", "max_image_pixels"], lambda count: count >= 1, "at least 1")
    check(args, ["cost"], lambda cost: cost > 0, "above 0")
    if args.cross_validate and args.cost != COST:
        raise UserError("--cross-validate chooses the costs: drop it, or --cost")
    check_ranges(args)
    return args


def summary_parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "Run every evaluation of a checkpoint's page: kNN, the linear protocol, and fine-tuning on "
        "1 %, 10 % and 100 % of the labels.",
        data="as for linear.py",
        arch="that of the checkpoint",
    )
    add = parser.add_argument
    add("--pretrained", required=True, metavar="WEIGHTS", help=PRETRAINED)
    add("--output", default="output/summary", metavar="DIR",
        help="folder of the runs and of summary.json and summary.md; what it holds is not run "
        "again")  # fmt: skip
    add("--stages", nargs="+", default=list(STAGES), choices=STAGES, metavar="STAGE",
        help=f"which to run, of {', '.join(STAGES)}")  # fmt: skip
    add("--lists", nargs="+", default=[], metavar="PERCENT=FILE",
        help="lists of the images to fine-tune on, such as SimCLR's of ImageNet: 1=FILE 10=FILE; "
        "default: as large a share of each class, drawn by the seed")  # fmt: skip
    add("-b", "--batch-size", default=256, type=int,
        help="global; learning rates are scaled with it")  # fmt: skip
    add("--epochs", default=None, type=int,
        help="length of each training, its drops moved alike; default: its protocol's")  # fmt: skip
    add_dataset_flags(add)
    add("--small-stem", action="store_true", help="as the encoder was pretrained")
    add("--cache-features", action="store_true",
        help="the linear protocol on features of centre crops, computed once")  # fmt: skip
    add("--amp", default="auto", choices=["auto", *AMP],
        help="mixed precision of the encoder")  # fmt: skip
    add("--seed", default=0, type=int, help="of all draws")
    add("--max-unreadable", default=0.01, type=float, help="share of the images that may be")
    add("-p", "--print-freq", default=100, type=int, help="steps between two log lines")
    return parser


def parse_summary(argv: list[str]) -> argparse.Namespace:
    """Flags, checked; `lists` becomes {stage: file}. Raises UserError."""
    args = summary_parser().parse_args(argv)
    counts = ["batch_size", "epochs", "image_size", "max_image_pixels", "print_freq"]
    check(args, counts, lambda count: count >= 1, "at least 1")
    pairs = [word.partition("=") for word in args.lists]
    for percent, _, file in pairs:
        if percent not in ("1", "10") or not file:
            raise UserError(f"--lists {percent}: write 1=FILE or 10=FILE")
        if f"finetune_{percent}" not in args.stages:
            raise UserError(f"--lists {percent}={file}: --stages lacks finetune_{percent}")
    if len({percent for percent, _, _ in pairs}) < len(pairs):
        raise UserError(f"--lists {' '.join(args.lists)}: a stage has one list")
    args.lists = {f"finetune_{percent}": file for percent, _, file in pairs}
    check_ranges(args)
    return args


def embed_parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "Write a checkpoint's features of any images, with their names, and a sheet of nearest "
        "neighbours.",
        data="any folder of images, or tar shards as for main.py",
        arch="that of the checkpoint",
    )
    add = parser.add_argument
    add("--pretrained", required=True, metavar="WEIGHTS", help=PRETRAINED)
    add("--output", required=True, metavar="FILE", help="features and names: .npz or .parquet")
    add("--sheet", metavar="FILE.png",
        help="draw some images, each with those nearest to it; default: no sheet")  # fmt: skip
    add("--queries", default=12, type=int, help="images that the sheet has a row for")
    add("-k", "--neighbours", default=8, type=int, dest="k", help="images in each row of the sheet")
    add("--small-stem", action="store_true", help="as the encoder was pretrained")
    add("--amp", default="none", choices=AMP, help="mixed precision of the encoder")
    add("--seed", default=0, type=int, help="of the sheet's rows, and of --pretrained random")
    add("--max-unreadable", default=0.01, type=float,
        help="share of the images that may be unreadable")  # fmt: skip
    parser.set_defaults(batch_size=1)
    return parser


def parse_embed(argv: list[str]) -> argparse.Namespace:
    """Flags, checked. Raises UserError."""
    args = embed_parser().parse_args(argv)
    check(args, ["k", "queries", "image_size", "max_image_pixels"], lambda n: n >= 1, "at least 1")
    if Path(args.output).suffix not in (".npz", ".parquet"):
        raise UserError(f"--output {args.output}: features are written as .npz or .parquet")
    check_sheet(args)
    check_ranges(args)
    return args
