#!/usr/bin/env python
"""Classify VOC 2007 by linear SVMs on a checkpoint's frozen features, one for each class.

    python pretrain/voc_svm.py DATA --pretrained output/checkpoint_last.pth.tar --output svm.json
    python pretrain/voc_svm.py DATA --pretrained CHECKPOINT --cross-validate

Features are averaged over the centre crop (224 of a short side of 256) and L2-normalised. The SVMs
are scikit-learn's LinearSVC, trained on trainval with C = 0.5 and positives twice as heavy as
negatives, the setting of "Revisiting Contrastive Methods" (arXiv:2106.05967). The mAP on test is
the mean area under the interpolated precision-recall curve, as in its code and in VISSL.
"""

try:
    from moco_det.common.errors import start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from pretrain.flags.evaluation import parse_voc_svm

if __name__ == "__main__":
    start_command(parse_voc_svm)  # --help and mistakes end before the imports that take seconds

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moco_det.common.errors import import_optional
from moco_det.common.files import write_json
from moco_det.common.images import allow_pixels
from moco_det.common.processes import is_main, print_on_main
from pretrain.data.voc_labels import VocLabels, find_voc
from pretrain.engine.optimization import AMP_DTYPES
from pretrain.evaluation.features import SplitFeatures, load_encoder, pooled
from pretrain.evaluation.svm import COSTS, NEEDS, ClassResult, classify_all
from pretrain.flags.launch import check_output_files, launch, loading


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """Print the mAP, and write it if asked to; one of the run's processes."""
    allow_pixels(args.max_image_pixels)
    import_optional("sklearn.svm", *NEEDS)
    check_output_files(args)
    classes, train, test = find_voc(Path(args.data), args.train_split, args.test_split)
    torch.manual_seed(args.seed)
    encoder = load_encoder(args.pretrained, args.arch, 1, args.small_stem)
    backbone = pooled(encoder.to(device, memory_format=torch.channels_last))
    splits = [features_of(split, backbone, args, device) for split in (train, test)]
    costs = COSTS if args.cross_validate else [args.cost]
    threads = loading(args, device, args.seed).workers
    counts = args.difficult == "negative"
    results = classify_all(classes, *splits, costs, args.seed, threads, counts)
    values = report(results)
    if args.output and is_main():
        write_json(args.output, values, indent=None)


def features_of(
    split: VocLabels, backbone: nn.Module, args: argparse.Namespace, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Normalised features M x D and labels M x C of a split's readable images."""
    batching = loading(args, device, args.seed)
    found = SplitFeatures(split.images, args.image_size, batching, device, AMP_DTYPES[args.amp])
    features, numbers = found.compute(backbone)
    return F.normalize(features.double(), dim=1).cpu().numpy(), split.labels[numbers.cpu().numpy()]


def report(results: dict[str, ClassResult]) -> dict[str, float]:
    """What is written of the classes: percent, under flat names. Prints them."""
    for name, result in results.items():
        print_on_main(f"{name:20s}AP {result.ap:6.2f} %  C {result.cost:g}")
    slow = [name for name, result in results.items() if not result.converged]
    if slow:
        print_on_main(
            f"note: {len(slow)} of {len(results)} SVMs ended at their most iterations, above the "
            f"tolerance, as is usual for large costs: {', '.join(slow)}"
        )
    mean = float(np.mean([result.ap for result in results.values()]))
    print_on_main(f"mAP {mean:.2f} %  ({len(results)} classes)")
    each = {f"voc_svm_ap_{name}": result.ap for name, result in results.items()}
    return {"voc_svm_map": mean} | each


if __name__ == "__main__":
    launch(evaluate, parse_voc_svm)
