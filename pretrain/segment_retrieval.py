#!/usr/bin/env python
"""Label segments of VOC's val images by the nearest ones of train, by a checkpoint's features.

    python pretrain/segment_retrieval.py DATA --pretrained output/checkpoint_last.pth.tar
    python pretrain/segment_retrieval.py DATA --pretrained CHECKPOINT --sheet segments.png

As in "Revisiting Contrastive Methods" (Table 6): nothing is trained but k-means within each image.
"""

try:
    from moco_det.common.errors import start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from pretrain.flags.dense import parse_segment_retrieval

if __name__ == "__main__":
    start_command(parse_segment_retrieval)  # --help and mistakes end here, before slow imports

import argparse
from pathlib import Path

import torch

from moco_det.common.files import replacing, write_json
from moco_det.common.images import allow_pixels
from moco_det.common.processes import (
    from_main,
    is_main,
    on_main,
    print_on_main,
    workers_per_process,
)
from pretrain.data.segmented import find_segmented
from pretrain.engine.device import use_deterministic_kernels
from pretrain.evaluation.features import load_encoder
from pretrain.evaluation.segments import Segmenter, draw_retrievals, k_means, scores
from pretrain.evaluation.spatial_features import SpatialFeatures
from pretrain.flags.launch import check_output_files, launch


def retrieve(args: argparse.Namespace, device: torch.device) -> None:
    """Print the mean IoU over 7 and 21 classes, and write what is asked for; one of the run's
    processes."""
    allow_pixels(args.max_image_pixels)
    check_output_files(args)
    k_means()  # it may not be installed
    train, val = (
        from_main(on_main(find_segmented, Path(args.data), split))
        for split in (args.train_split, "val")
    )
    torch.manual_seed(args.seed)
    use_deterministic_kernels(True)
    encoder = load_encoder(args.pretrained, args.arch, 1, args.small_stem)
    backbone = SpatialFeatures(encoder, "layer4", dilated=True).eval().to(device)
    threads = max(1, workers_per_process(args.workers))
    cut = Segmenter(backbone, args.segments, args.image_size, args.seed, device, threads)
    bank, queries = cut.segments(train, args.train_split), cut.segments(val, "val")
    if not is_main():
        return
    values = scores(bank, queries, device)
    print_on_main(
        f"segment retrieval: IoU over 7 classes {values['retrieval_miou_7']:.2f}, "
        f"over 21 {values['retrieval_miou_21']:.2f}  "
        f"({len(queries.images)} segments of {len(val)} images among {len(bank.images)})"
    )
    if args.output:
        write_json(args.output, values, indent=None)
    if args.sheet:
        sheet = draw_retrievals((bank, train), (queries, val), device)
        with replacing(args.sheet) as temporary:
            sheet.save(temporary, "PNG")


if __name__ == "__main__":
    launch(retrieve, parse_segment_retrieval)
