#!/usr/bin/env python
"""From unlabelled images to a detection AP in one command, with a report at the end.

    python tools/quickstart.py
    python tools/quickstart.py --images DIR --voc DIR --output DIR

Draws a small data set (or takes yours), pretrains a ResNet-18 with MoCo v2 on images without
labels, converts it, and fine-tunes the same detector from it and from random weights.
"""

from moco_det.common.ending import start_command

if __name__ == "__main__":
    start_command()  # before the imports that take seconds

import argparse
import sys
from pathlib import Path

from moco_det.benchmark.jobs.quickstart import make_plan, run
from moco_det.benchmark.jobs.runner import JobFailed, exit_on_signals
from moco_det.common.errors import command_parser, exit_cleanly
from moco_det.common.files import make_folder
from moco_det.common.installation import own_file

RECIPE = own_file("configs/pretrain/quickstart_r18.yaml")
CONFIG = own_file("configs/quick/quickstart_R18_FPN.yaml")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("output/quickstart"), metavar="DIR")
    add("--images", type=Path, metavar="DIR", help="your unlabelled images; needs --voc")
    add("--voc", type=Path, metavar="DIR",
        help="your JPEGImages, Annotations and ImageSets/Main; needs --images")  # fmt: skip
    add("--seed", type=int, default=0, help="of the data, pretraining and first pair of detectors")
    add("--seeds", type=int, default=2, help="pairs of detectors to train (default: 2)")
    add("--recipe", type=Path, default=RECIPE, metavar="YAML", help="flags of pretraining")
    add("--config-file", type=Path, default=CONFIG, metavar="YAML", help="config of the detector")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with exit_cleanly(), exit_on_signals(f"stopping; what is done so far is in {args.output}"):
        plan = make_plan(**vars(args))
        make_folder(args.output, "--output")
        try:
            page = run(plan)
        except JobFailed as failure:
            print(f"error: {failure}", file=sys.stderr)
            sys.exit(failure.code)
    print(f"report: {page}")


if __name__ == "__main__":
    main()
