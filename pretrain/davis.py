#!/usr/bin/env python
"""Follow the objects of DAVIS 2017 through its videos by a checkpoint's frozen features.

    python pretrain/davis.py DATA --pretrained output/checkpoint_last.pth.tar
    python pretrain/davis.py DATA --pretrained CHECKPOINT --masks DIR --sheet masks.png

Label propagation, as in "Revisiting Contrastive Methods" (Table 5): nothing is trained.
"""

try:
    from moco_det.common.errors import start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from pretrain.flags.dense import parse_davis

if __name__ == "__main__":
    start_command(parse_davis)  # --help and mistakes end before the imports that take seconds

import argparse
import contextlib
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
from moco_det.common.run_folders import RunFiles, claimed
from pretrain.data.davis import Davis
from pretrain.engine.device import use_deterministic_kernels
from pretrain.evaluation.features import load_encoder
from pretrain.evaluation.label_propagation import Propagation
from pretrain.evaluation.overlays import stacked
from pretrain.evaluation.spatial_features import SpatialFeatures
from pretrain.evaluation.video_segmentation import (
    MaskFolder,
    VideoSegmenter,
    follow_all,
    mean_measures,
)
from pretrain.flags.launch import check_output_files, launch

ROWS = 8  # videos of the sheet
MASKS = RunFiles(marks=(), others=(), flag="--masks", resume="the same command")


def follow(args: argparse.Namespace, device: torch.device) -> None:
    """Print J, F and their mean, and write what is asked for; one of the run's processes."""
    allow_pixels(args.max_image_pixels)
    check_output_files(args)
    videos = from_main(on_main(Davis(Path(args.data), args.split).videos))
    torch.manual_seed(args.seed)
    use_deterministic_kernels(True)
    encoder = load_encoder(args.pretrained, args.arch, 1, args.small_stem)
    propagation = Propagation(args.top_k, args.temperature, args.radius, args.context)
    # "res4" with stride 8, as STC's public code takes it from any ResNet.
    backbone = SpatialFeatures(encoder, "layer3", dilated=False).eval().to(device)
    threads = max(1, workers_per_process(args.workers))
    segmenter = VideoSegmenter(backbone, propagation, device, args.image_size, threads)
    folder, held = None, contextlib.nullcontext()
    if args.masks:
        folder, held = MaskFolder(Path(args.masks)), claimed(args.masks, MASKS, False, False)
    with held:
        if folder:
            on_main(folder.prepare, segmenter)
        followed = follow_all(segmenter, videos, folder, drawn=ROWS if args.sheet else 0)
    values = mean_measures(followed)
    objects = sum(len(video.measures) for video in followed)
    print_on_main(
        f"DAVIS 2017 {args.split}: J {values['davis_j_mean']:.2f}  F {values['davis_f_mean']:.2f}  "
        f"J&F {values['davis_jf_mean']:.2f}  ({len(videos)} videos, {objects} objects)"
    )
    if args.output and is_main():
        write_json(args.output, values, indent=None)
    if args.sheet and is_main():
        sheet = stacked([video.strip for video in followed if video.strip is not None])
        with replacing(args.sheet) as temporary:
            sheet.save(temporary, "PNG")


if __name__ == "__main__":
    launch(follow, parse_davis)
