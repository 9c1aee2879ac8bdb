"""The flags of davis.py and segment_retrieval.py, which judge a checkpoint's feature maps."""

import argparse
from pathlib import Path

from moco_det.common.errors import UserError
from pretrain.flags.common import PRETRAINED, base_parser, check, check_ranges, check_sheet


def davis_parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "Follow the objects of DAVIS 2017 through its videos by a checkpoint's frozen features, "
        "and measure J and F.",
        data="DAVIS 2017 at 480p: the folder that holds JPEGImages, Annotations and ImageSets",
        arch="that of the checkpoint",
        image_size="short side that frames are resized to; default: as they are",
    )
    _add_common(parser)
    add = parser.add_argument
    add("--split", default="val", metavar="NAME", help="list of sequences, ImageSets/2017/NAME.txt")
    add("--masks", default=None, metavar="DIR",
        help="write the masks, which the official evaluation reads and a run that was killed goes "
        "on from; default: they are not kept")  # fmt: skip
    add = parser.add_argument_group("label propagation, as in STC's evaluation").add_argument
    add("--top-k", default=10, type=int, help="sources that a place takes its labels from")
    add("-t", "--temperature", default=0.05, type=float, help="of the softmax of their cosines")
    add("--radius", default=12.0, type=float,
        help="within which a place finds them, but in the first frame; in places of the feature "
        "map")  # fmt: skip
    add("--context", default=20, type=int, help="frames before the current one, beside the first")
    parser.set_defaults(image_size=None)
    return parser


def parse_davis(argv: list[str]) -> argparse.Namespace:
    """Flags, checked. Raises UserError."""
    args = davis_parser().parse_args(argv)
    check(args, ["top_k", "context"], lambda count: count >= 1, "at least 1")
    check(args, ["radius"], lambda places: places >= 1, "at least 1")
    check(args, ["temperature"], lambda value: value > 0, "above 0")
    if Path(args.split).name != args.split:
        raise UserError(f"--split {args.split}: it is the name of a list, such as val")
    _check_common(args)
    return args


def segment_retrieval_parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "Label segments of PASCAL VOC's val images by the nearest segments of train, by a "
        "checkpoint's frozen features.",
        data="PASCAL VOC 2012: the folder VOC2012, with JPEGImages, SegmentationClass and "
        "ImageSets/Segmentation",
        arch="that of the checkpoint",
        image_size="side of the square that images are resized to",
    )
    _add_common(parser)
    add = parser.add_argument
    add("--segments", default=15, type=int, help="of an image: K of k-means")
    add("--train-split", default="train", metavar="NAME",
        help="list of the images whose segments are retrieved; train_aug needs "
        "SegmentationClassAug")  # fmt: skip
    parser.set_defaults(image_size=512)
    return parser


def parse_segment_retrieval(argv: list[str]) -> argparse.Namespace:
    """Flags, checked. Raises UserError."""
    args = segment_retrieval_parser().parse_args(argv)
    check(args, ["segments"], lambda count: count >= 1, "at least 1")
    if Path(args.train_split).name != args.train_split:
        raise UserError(
            f"--train-split {args.train_split}: it is the name of a list, such as train"
        )
    _check_common(args)
    return args


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pretrained", required=True, metavar="WEIGHTS", help=PRETRAINED)
    add("--small-stem", action="store_true", help="as the encoder was pretrained")
    add(
        "--seed", default=0, type=int, help="of all draws, --pretrained random's weights among them"
    )
    add("--output", default=None, metavar="FILE",
        help="write the numbers as JSON as well; default: no file")  # fmt: skip
    add("--sheet", default=None, metavar="FILE.png",
        help="draw some of what is found; default: no sheet")  # fmt: skip


def _check_common(args: argparse.Namespace) -> None:
    check(args, ["image_size", "max_image_pixels"], lambda count: count >= 1, "at least 1")
    check_sheet(args)
    check_ranges(args)
