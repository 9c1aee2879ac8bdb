#!/usr/bin/env python
"""Train a classifier on a pretrained encoder: a linear one on its frozen features, or end to end.

    python pretrain/linear.py DATA --pretrained output/checkpoint_last.pth.tar
    torchrun --nproc_per_node 8 pretrain/linear.py DATA --pretrained CHECKPOINT
    python pretrain/linear.py DATA --resume output/linear/checkpoint_best.pth.tar --evaluate
    python pretrain/linear.py DATA --finetune --pretrained CHECKPOINT

Flags are those of facebookresearch/moco's main_lincls.py, with a few more. The learning rate is
that of a global batch of 256, whatever the launch, and is not scaled by itself: at another
--batch-size B pass 30 * B / 256. An epoch's last, incomplete batch is dropped.

With --finetune all weights are trained, under batch statistics, and the defaults are A.7's --lr
0.03, A.6's --schedule 70 90 and --wd 1e-4 (arXiv:1911.05722). DATA may be iNaturalist 2018 as it is
published (A.6), for both protocols.

Every process holds the features of all validation images, with --cache-features of all training
images as well: 10 GB for ImageNet and a ResNet-50.
"""

import argparse
import os
import sys

import torch

from moco_det.common.errors import UserError
from pretrain.engine.optimization import AMP_DTYPES
from pretrain.evaluation import finetuning
from pretrain.evaluation.linear_probe import LinearProbe
from pretrain.flags import add_launch_flags, launch, recipe_flags


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("data", metavar="DATA",
        help="ImageFolder root: train/CLASS and val/CLASS; or iNaturalist 2018")  # fmt: skip
    add("--recipe", metavar="YAML", help="flags by their long names; a flag given beside it wins")
    add("--pretrained", default="", metavar="PATH|random|supervised",
        help="checkpoint of pretraining; supervised: torchvision's weights")  # fmt: skip
    add("--finetune", action="store_true", help="train all weights, not a linear classifier only")
    add("--output", default="output/linear", metavar="DIR", help="where everything is written")
    add("-a", "--arch", default="resnet50", help="that of the checkpoint")
    add("-j", "--workers", default=len(os.sched_getaffinity(0)), type=int,
        help="data loading processes on this node")  # fmt: skip
    add("--epochs", default=100, type=int)
    add("--start-epoch", default=0, type=int)
    add("-b", "--batch-size", default=256, type=int, help="global, whatever the launch")
    add("--lr", "--learning-rate", default=30.0, type=float, dest="lr",
        help="for a global batch of 256; not scaled by itself")  # fmt: skip
    add("--schedule", default=[60, 80], nargs="*", type=int, help="epochs of a drop by 10")
    add("--momentum", default=0.9, type=float, help="of SGD")
    add("--wd", "--weight-decay", default=0.0, type=float, dest="weight_decay")
    add("-p", "--print-freq", default=10, type=int, help="steps between two reports")
    add("--resume", default="", metavar="PATH|auto", help="auto: DIR's last one, if there is one")
    add("-e", "--evaluate", action="store_true", help="only evaluate --resume on DATA/val")
    add("--seed", default=None, type=int, help="also selects deterministic cuDNN algorithms")
    add_launch_flags(parser)

    add = parser.add_argument_group("beyond the official code").add_argument
    add("--image-size", default=224, type=int, help="side of a view in pixels")
    add("--small-stem", action="store_true", help="as the encoder was pretrained")
    add("--amp", default="none", choices=AMP_DTYPES, help="precision of the backbone")
    add("--cache-features", action="store_true",
        help="train on features of centre crops, computed once")  # fmt: skip
    add("--bn-groups", default=None, type=int,
        help="--finetune: BN groups per process; default: of about 32 images each")  # fmt: skip
    add("--eval-every", default=1, type=int, help="epochs between validations and checkpoints")
    add("--save-steps", default=0, type=int, help="also save the last checkpoint every N steps")
    add("--max-unreadable", default=0.01, type=float, help="share of images that may be corrupt")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags over recipe over the protocol's defaults, checked. Raises UserError."""
    parser = build_parser()
    args = parser.parse_args(argv)
    flags = recipe_flags(args.recipe, parser) if args.recipe else []
    if args.finetune or "--finetune" in flags:
        parser.set_defaults(**finetuning.DEFAULTS)
    parser.set_defaults(**vars(parser.parse_args([*flags, "--", args.data])))
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "print_freq", "image_size", "eval_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.finetune and args.cache_features:
        raise UserError("--cache-features belongs to a frozen backbone: drop it, or --finetune")
    if args.bn_groups and not args.finetune:
        raise UserError("--bn-groups belongs to --finetune: frozen BN has no groups")
    return args


def classify(args, device: torch.device) -> None:
    """Train a classifier, or evaluate one, from the flags `args`; one of the run's processes."""
    protocol = finetuning.FineTuning if args.finetune else LinearProbe
    run = protocol(args, device)
    if args.evaluate:
        run.evaluate()
    else:
        run.train()


if __name__ == "__main__":
    launch(classify, lambda: parse(sys.argv[1:]))
