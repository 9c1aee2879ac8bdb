#!/usr/bin/env python
"""Classify DATA/val by the nearest neighbours in DATA/train on a checkpoint's frozen features.

    python pretrain/knn.py DATA --pretrained output/checkpoint_last.pth.tar

The weighted kNN of Wu et al. 2018 (Sec. 3.4): nothing is trained.
"""

try:
    from moco_det.common.errors import start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from pretrain.flags.evaluation import parse_knn

if __name__ == "__main__":
    start_command(parse_knn)  # --help and mistakes end here, before the imports that take seconds

import argparse
from pathlib import Path

import torch

from moco_det.common.errors import UserError
from moco_det.common.files import write_json
from moco_det.common.images import allow_pixels
from moco_det.common.processes import is_main, print_on_main, workers_per_process
from pretrain.data.benchmarks import FOLDERS, find_dataset
from pretrain.evaluation.features import load_encoder
from pretrain.evaluation.knn import KnnMonitor
from pretrain.flags.launch import check_output_files, launch


def classify(args: argparse.Namespace, device: torch.device) -> None:
    """Print the top-1 accuracy, and write it if asked to; one of the run's processes."""
    allow_pixels(args.max_image_pixels)
    check_output_files(args)
    data = Path(args.data)
    splits = None
    if args.dataset != FOLDERS or args.download:
        splits = find_dataset(args.dataset, data, args.download)
    elif not KnnMonitor.applies_to(data):
        raise UserError(f"{data} lacks class folders: DATA needs train/CLASS and val/CLASS")
    torch.manual_seed(args.seed)
    encoder = load_encoder(args.pretrained, args.arch, 1, args.small_stem)
    encoder = encoder.to(device, memory_format=torch.channels_last)
    workers = workers_per_process(args.workers)
    votes = args.k, args.temperature, args.knn_bank, args.seed
    knn = KnnMonitor(data, args.image_size, workers, device, *votes, splits=splits)
    if args.k > (images := len(knn.bank.split.paths)):
        print_on_main(f"note: -k {args.k} is more than there are images: all {images} vote")
    top1 = knn.top1(encoder)
    print_on_main(f"kNN top-1 {top1:.2f} %  (k {args.k}, temperature {args.temperature:g})")
    if args.output and is_main():
        values = {"knn_top1": top1, "k": args.k, "temperature": args.temperature}
        write_json(args.output, values, indent=None)


if __name__ == "__main__":
    launch(classify, parse_knn)
