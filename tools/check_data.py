#!/usr/bin/env python
"""Check the data sets of a YAML before training on them: a dataset doctor.

python tools/check_data.py --config-file configs/X.yaml
python tools/check_data.py --config-file configs/X.yaml --images all
python tools/check_data.py --config-file configs/X.yaml DATASETS.TRAIN voc:DIR:train
python tools/check_data.py --davis DIR

Reports every problem of every set: missing files and where to get them; counts that differ from
the official ones; images that cannot be decoded or have another size than annotated; boxes
of zero area; missing masks and keypoints; broken dense pose, and files of the body model that it
needs; classes that do not fit the model; wrong versions. --davis checks DAVIS 2017, for
pretrain/davis.py: frames without masks, sizes that differ, objects that are not numbered from 1.
"""

import argparse

try:
    from moco_det.common.errors import command_parser, exit_cleanly, start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from moco_det.config.flags import add_config_arguments


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, "0 no problem; 1 problems, or an error")
    add_config_arguments(parser, required=False, help="YAML config (default: none)")
    add = parser.add_argument
    add("--davis", metavar="DIR", help="DAVIS 2017, its list val (default: none)")
    add("--images", type=_count, default=100, metavar="N",
        help="images and label maps to decode of each set, or 'all'")  # fmt: skip
    add("--list", type=int, default=10, metavar="N",
        help="problems of each kind to print for each set; 0 for all")  # fmt: skip
    args = parser.parse_args(arguments)
    if not (args.config_file or args.davis):
        parser.error("name what to check: --config-file FILE or --davis DIR")
    return args


def _count(text: str) -> int | None:
    """The number, or None for "all"."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'all'")
    return int(text)


if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

import sys
from pathlib import Path

from moco_det.common.images import allow_pixels
from moco_det.config.loading import load_config
from moco_det.dataset_doctor import Report, describe, examine, table
from pretrain.data.davis import OFFICIAL, Davis


def main(arguments: list[str] | None = None) -> None:
    args, reports = parse(arguments), []
    with exit_cleanly():
        if args.config_file:
            cfg = load_config(args.config_file, args.opts)
            allow_pixels(cfg.INPUT.MAX_IMAGE_PIXELS)
            reports += examine(cfg, args.images)
        if args.davis:
            reports.append(examine_davis(Davis(Path(args.davis)), args.images))
    for report in reports:
        if report.problems or report.notes:
            print(describe(report, args.list), end="\n\n")
    print(table(reports))
    sys.exit(any(report.problems for report in reports))


def examine_davis(davis: Davis, limit: int | None) -> Report:
    """Check the sequences of a list; `limit`: frames that are decoded, None for all."""
    report = Report(f"davis:{davis.root}:{davis.split}")
    for kind, text in davis.problems():
        report.refuse(kind, text)
    if not report.problems:
        videos = davis.videos()
        report.listed(sum(len(video.frames) for video in videos), davis.count_objects(videos))
        report.decoded, unreadable = davis.decode(videos, limit)
        for text in unreadable:
            report.refuse("image", text)
        if len(videos) != OFFICIAL[davis.split]:
            report.note(f"{len(videos)} sequences; the official list has {OFFICIAL[davis.split]}")
    return report


if __name__ == "__main__":
    main()
