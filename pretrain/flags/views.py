"""The flags of an image's views: which crops of it are drawn, and how the positives look."""

import argparse

from moco_det.common.errors import UserError
from pretrain.flags.common import check

STRONG = ("none", "autoaugment", "mix")  # of `multi_crop.STRONG`: see `common.AMP`


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    """Which views of an image are positives of its key: arXiv:2106.05967, Sec. 3.1, 4.1 and 4.2."""
    add = parser.add_argument_group('views of "Revisiting Contrastive Methods"').add_argument
    add("--multi-crop", default=0, type=int, metavar="N",
        help="small crops beside the two of --image-size, which is 160 in the paper")  # fmt: skip
    add("--small-size", default=96, type=int, help="side of a small crop in pixels")
    add("--small-scale", default=[0.05, 0.14], type=float, nargs=2, metavar=("LEAST", "MOST"),
        help="area of a small crop, as a share of the image's")  # fmt: skip
    add("--constrained", default=0.0, const=0.1, type=float, nargs="?", metavar="SHARE",
        help="of each small crop, at least, lies within the key's crop; 0.1 where no number "
        "follows; default: 0, small crops anywhere")  # fmt: skip
    add("--strong-aug", default="none", choices=STRONG,
        help="AutoAugment in place of the colours, blur and flips of all crops but the key's, or "
        "either of the two at random")  # fmt: skip
    add("--min-iou", default=0.0, type=float, help="least IoU of the two large crops")
    add("--max-iou", default=1.0, type=float, help="largest IoU of the two large crops")


def check_views(args: argparse.Namespace) -> None:
    """Raises UserError for views that cannot be drawn, or that the mechanism has no use for."""
    check_crops(args)
    check(args, ["small_size"], lambda count: count >= 1, "at least 1")
    if args.constrained and not args.multi_crop:
        raise UserError("--constrained is about small crops: pass --multi-crop N as well")
    if args.multi_crop and args.mechanism != "moco":
        raise UserError(f"--multi-crop belongs to --mechanism moco, not to {args.mechanism}")
    limited = (args.min_iou, args.max_iou) != (0, 1)
    if args.mechanism == "memory-bank" and (limited or args.strong_aug != "none"):
        raise UserError(
            "--mechanism memory-bank has a single view of an image in a step: --min-iou, --max-iou "
            "and --strong-aug belong to the other mechanisms"
        )


def check_crops(args: argparse.Namespace) -> None:
    """Raises UserError for crops that cannot be drawn."""
    check(args, ["crop_min"], lambda value: 0 < value <= 1, "above 0 and at most 1")
    least, most = args.small_scale
    if not 0 < least <= most <= 1:
        raise UserError(
            f"--small-scale {least:g} {most:g}: it takes the least and the largest share of the "
            "image's area, above 0 and at most 1"
        )
    if args.min_iou > args.max_iou:
        raise UserError(f"--min-iou {args.min_iou:g} is above --max-iou {args.max_iou:g}")
    if args.min_iou == 1 and args.crop_min < 1:
        raise UserError("--min-iou 1: two random crops are never the same; pass less")
    unavoidable = 2 * args.crop_min - 1  # of two crops that cover the image together
    if args.max_iou < unavoidable:
        raise UserError(
            f"--max-iou {args.max_iou:g} cannot be met: two crops of --crop-min {args.crop_min:g} "
            f"of the image have an IoU of {unavoidable:g} at least"
        )
