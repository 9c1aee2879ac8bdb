#!/usr/bin/env python
"""Write a checkpoint's features of any images, with their names, and a sheet of nearest neighbours.

    python pretrain/embed.py DATA --pretrained output/checkpoint_last.pth.tar --output features.npz
    python pretrain/embed.py DATA --pretrained CHECKPOINT --output F.parquet --sheet neighbours.png

The features are the backbone's, averaged over the centre crop, in front of the projection head.
"""

try:
    from moco_det.common.errors import start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from pretrain.flags.evaluation import parse_embed

if __name__ == "__main__":
    start_command(parse_embed)  # --help and mistakes end here, before the imports that take seconds

import argparse
from pathlib import Path

import torch

from moco_det.common.files import replacing
from moco_det.common.images import allow_pixels
from moco_det.common.processes import is_main, print_on_main
from pretrain.engine.optimization import AMP_DTYPES
from pretrain.evaluation.embedding import draw_sheet, embed, write_embedding
from pretrain.evaluation.features import load_encoder, pooled
from pretrain.flags.launch import check_output_files, launch, loading


def write_features(args: argparse.Namespace, device: torch.device) -> None:
    """Embed DATA and write what is asked for; one of the run's processes."""
    allow_pixels(args.max_image_pixels)
    check_output_files(args)
    torch.manual_seed(args.seed)
    encoder = load_encoder(args.pretrained, args.arch, 1, args.small_stem)
    backbone = pooled(encoder.to(device, memory_format=torch.channels_last))
    batching = loading(args, device, args.seed)
    found = embed(backbone, args.data, args.image_size, batching, device, AMP_DTYPES[args.amp])
    if is_main():
        write_embedding(Path(args.output), found)
        if args.sheet:
            sheet = draw_sheet(args.data, found, args.queries, args.k, args.seed)
            with replacing(args.sheet) as temporary:
                sheet.save(temporary, "PNG")
    count, length = found.features.shape
    print_on_main(f"features {count} x {length} in {args.output}")


if __name__ == "__main__":
    launch(write_features, parse_embed)
