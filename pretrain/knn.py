#!/usr/bin/env python
"""Classify DATA/val by the nearest neighbours in DATA/train on a checkpoint's frozen features.

    python pretrain/knn.py DATA --pretrained output/checkpoint_last.pth.tar

The weighted kNN of Wu et al. 2018 (Sec. 3.4): nothing is trained.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from moco_det.common.errors import UserError
from moco_det.common.processes import print_on_main, rank, workers_per_process
from pretrain.evaluation.features import load_encoder
from pretrain.evaluation.weighted_knn import KnnMonitor
from pretrain.flags import add_launch_flags, launch


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="ImageFolder root: train/CLASS and val/CLASS")
    add("--pretrained", required=True, metavar="PATH|random", help="checkpoint of pretraining")
    add("-a", "--arch", default="resnet50", help="that of the checkpoint")
    add("-j", "--workers", default=len(os.sched_getaffinity(0)), type=int,
        help="data loading processes on this node")  # fmt: skip
    add("-k", "--neighbours", default=200, type=int, dest="k", help="how many of them vote")
    add("-t", "--temperature", "--sigma", default=0.07, type=float,
        help="a neighbour's vote is exp(cosine / this)")  # fmt: skip
    add("--image-size", default=224, type=int, help="side of a view in pixels")
    add("--small-stem", action="store_true", help="as the encoder was pretrained")
    add("--seed", default=0, type=int, help="of --pretrained random")
    add("--output", default=None, metavar="FILE", help="the accuracy as JSON as well")
    add_launch_flags(parser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags, checked. Raises UserError."""
    args = build_parser().parse_args(argv)
    if args.k < 1 or args.image_size < 1:
        raise UserError("--neighbours and --image-size must be at least 1")
    if args.temperature <= 0:
        raise UserError("--temperature must be above 0")
    return args


def classify(args, device: torch.device) -> None:
    """Print the top-1 accuracy, and write it if asked to; one of the run's processes."""
    data = Path(args.data)
    if not KnnMonitor.applies_to(data):
        raise UserError(f"{data} lacks class folders: DATA needs train/CLASS and val/CLASS")
    torch.manual_seed(args.seed)
    encoder = load_encoder(args.pretrained, args.arch, 1, args.small_stem)
    encoder = encoder.to(device, memory_format=torch.channels_last)
    workers = workers_per_process(args.workers)
    knn = KnnMonitor(data, args.image_size, workers, device, args.k, args.temperature)
    top1 = knn.top1(encoder)
    print_on_main(f"kNN top-1 {top1:.2f} %  (k {args.k}, temperature {args.temperature:g})")
    if args.output and rank() == 0:
        values = {"knn_top1": top1, "k": args.k, "temperature": args.temperature}
        Path(args.output).write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    launch(classify, lambda: parse(sys.argv[1:]))
