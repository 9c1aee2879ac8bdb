#!/usr/bin/env python
"""From unlabelled images to a detection AP in one command, with a report at the end.

    python tools/quickstart.py
    python tools/quickstart.py --images DIR --voc DIR --output DIR

Draws a small data set (or takes yours), pretrains a ResNet-18 with MoCo v2 on images without
labels, converts it, and fine-tunes the same detector from it and from random weights.
"""

import argparse
from pathlib import Path

try:
    from moco_det.common.errors import command_parser, exit_cleanly, start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from moco_det.common.installation import own_file

RECIPE = own_file("configs/pretrain/quickstart_r18.yaml")
CONFIG = own_file("configs/quick/quickstart_R18_FPN.yaml")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("output/quickstart"), metavar="DIR",
        help="folder of the data, the runs and the report")  # fmt: skip
    add("--images", type=Path, metavar="DIR",
        help="your unlabelled images; needs --voc (default: drawn ones)")  # fmt: skip
    add("--voc", type=Path, metavar="DIR",
        help="your JPEGImages, Annotations and ImageSets/Main; needs --images (default: drawn)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="of the data, pretraining and first pair of detectors")
    add("--seeds", type=int, default=3, help="pairs of detectors to train")
    add("--recipe", type=Path, default=RECIPE, metavar="YAML",
        help=f"flags of pretraining (default: {RECIPE.name})")  # fmt: skip
    add("--config-file", type=Path, default=CONFIG, metavar="YAML",
        help=f"config of the detector (default: {CONFIG.name})")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

import sys

from moco_det.benchmark.jobs.quickstart import make_plan, run
from moco_det.benchmark.jobs.runner import JobFailed, exit_on_signals
from moco_det.common.files import make_folder


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
