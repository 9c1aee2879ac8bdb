#!/usr/bin/env python
"""List a subset of DATA's images for pretraining: at random, or with a long tail of classes.

    python pretrain/subset.py DATA --random 118000 --output random.txt
    python pretrain/subset.py DATA --long-tailed --output long_tailed.txt
    python pretrain/main.py DATA --list long_tailed.txt --recipe configs/pretrain/moco_v2_r50.yaml

The images stay where they are. A long tail needs class folders.
"""

import argparse
import math
import os
from pathlib import Path

try:
    from moco_det.common.errors import UserError, at_least, command_parser, start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked. Raises UserError."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="a folder of images, or one with train/")
    add("--output", required=True, type=Path, metavar="FILE", help="a path a line, from DATA on")
    kind = parser.add_mutually_exclusive_group(required=True).add_argument
    kind("--random", type=at_least(1), metavar="N",
        help="so many images, each as likely as the others; default: --long-tailed")  # fmt: skip
    kind("--long-tailed", type=at_least(1), nargs="?", const=math.inf, metavar="N",
        help="classes whose sizes follow a Pareto distribution, of N images in all; by default the "
        "largest class stays as large")  # fmt: skip
    add("--alpha", default=6.0, type=float, help="of that distribution; 6 is ImageNet-LT's")
    add("--seed", default=0, type=at_least(0), help="of what is taken")
    args = parser.parse_args(arguments)
    if not 0.1 <= args.alpha <= 1000:  # true of NaN
        raise UserError(f"--alpha {args.alpha:g}: it takes numbers from 0.1 to 1000")
    return args


if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

import numpy as np

from moco_det.common.errors import exit_cleanly
from moco_det.common.files import check_output_file
from pretrain.data.images import training_folder
from pretrain.data.listing import find_images, write_list
from pretrain.data.subsets import class_numbers, long_tailed_subset, random_subset


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    check_output_file(args.output, "--output")
    folder = training_folder(args.data)
    paths = find_images(folder)
    if args.random:
        chosen = random_subset(len(paths), args.random, args.seed)
    else:
        total = None if args.long_tailed == math.inf else args.long_tailed
        chosen = long_tailed_subset(class_numbers(paths), args.alpha, args.seed, total)
    from_data = os.fsencode(os.path.relpath(folder, args.data))
    write_list(args.output, [os.path.normpath(os.path.join(from_data, p)) for p in paths[chosen]])
    classes = ""
    if all(b"/" in path for path in paths):
        sizes = np.bincount(class_numbers(paths[chosen]))
        classes = f", {len(sizes)} classes of {sizes.min()} to {sizes.max()}"
    print(f"{args.output}: {len(chosen)} of {len(paths)} images{classes}")


if __name__ == "__main__":
    with exit_cleanly():
        main()
