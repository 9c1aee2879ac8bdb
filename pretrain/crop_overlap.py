#!/usr/bin/env python
"""Draw how far two random crops of an image overlap, or the small crops of one image.

    python pretrain/crop_overlap.py DATA --output ious.png
    python pretrain/crop_overlap.py --image PHOTO.jpg --output crops.png

The first is a histogram of the IoUs of a query's and a key's crop, for images of the sizes that
those of DATA have. In the second the key's crop of an image is bright, and frames are small crops:
green ones lie within it as far as constrained multi-crop asks, red ones do not.
"""

import argparse
import contextlib
import os
from pathlib import Path

try:
    from moco_det.common.errors import UserError, at_least, command_parser, start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from pretrain.flags.common import check_ranges
from pretrain.flags.views import check_crops


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked. Raises UserError."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("data", type=Path, nargs="?", metavar="DATA",
        help="a folder of images, for their sizes; default: 480 x 640")  # fmt: skip
    add("--output", required=True, type=Path, metavar="FILE.png", help="the picture")
    add("--crop-min", default=0.2, type=float, help="least area of a large crop")
    add("--min-iou", default=0.0, type=float, help="least IoU of the two")
    add("--max-iou", default=1.0, type=float, help="largest IoU of the two")
    add("--pairs", default=10_000, type=at_least(1, 10**6), help="of crops in the histogram")
    add("--image", type=Path, metavar="FILE",
        help="draw small crops of this image; default: the histogram")  # fmt: skip
    add("--multi-crop", default=12, type=at_least(1, 100), metavar="N", help="small crops to draw")
    add("--small-scale", default=[0.05, 0.14], type=float, nargs=2, metavar=("LEAST", "MOST"),
        help="area of a small crop, as a share of the image's")  # fmt: skip
    add("--constrained", default=0.1, type=float, metavar="SHARE",
        help="of a small crop, at least, that is to lie within the key's")  # fmt: skip
    add("--seed", default=0, type=at_least(0), help="of the crops")
    args = parser.parse_args(arguments)
    if args.output.suffix != ".png":
        raise UserError(f"--output {args.output}: the picture is a .png")
    if args.data and args.image:
        raise UserError(f"--image {args.image} is all that is drawn: drop it, or {args.data}")
    check_crops(args)
    check_ranges(args)
    return args


if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

import numpy as np
from PIL import Image

from moco_det.common.errors import exit_cleanly
from moco_det.common.files import check_output_file, replacing
from moco_det.common.images import UnreadableImage, image_size, read_image
from pretrain.data.augmentations import MoCoAugmentation
from pretrain.data.crop_pictures import draw_crops, draw_histogram, draw_small_crops, pair_ious
from pretrain.data.images import training_folder
from pretrain.data.listing import find_images
from pretrain.data.multi_crop import MultiCrop

IMAGES = 1000  # of DATA, whose sizes are read


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    check_output_file(args.output, "--output")
    picture, said = small_crops(args) if args.image else histogram(args)
    with replacing(args.output) as temporary:
        picture.save(temporary, "PNG")
    print(f"{args.output}: {said}")


def histogram(args: argparse.Namespace) -> tuple[Image.Image, str]:
    """A picture, and what is in it, in words."""
    sizes = image_sizes(args.data, args.seed) if args.data else np.array([[480, 640]])
    large = MoCoAugmentation(1, aug_plus=True, crop_min=args.crop_min)
    crops = MultiCrop([large, large], ious=(args.min_iou, args.max_iou))
    ious, outside = pair_ious(sizes, crops, args.pairs, args.seed)
    of = f"images of {args.data.name}, {len(sizes)} sizes" if args.data else "a 480 x 640 image"
    title = f"Two crops of {args.crop_min:g} to 1 of the area of {of}"
    mean, apart = ious.mean(), (ious == 0).mean()
    unmet = f"; {outside} are outside the limits: no draw met them" if outside else ""
    return draw_histogram(ious, title), (
        f"{args.pairs} pairs of crops of {args.crop_min:g} to 1 of the area: {apart:.2%} do not "
        f"overlap, mean IoU {mean:.3f}, median {np.median(ious):.3f}{unmet}"
    )


def image_sizes(data: Path, seed: int) -> np.ndarray:
    """Height and width of some images of DATA, M x 2. Raises UserError where none is readable."""
    folder = training_folder(data)
    sizes = []
    for path in np.random.default_rng(seed).permutation(find_images(folder))[:IMAGES]:
        with contextlib.suppress(UnreadableImage):
            sizes.append(image_size(os.path.join(folder, os.fsdecode(path))))
    if not sizes:
        raise UserError(f"no readable image among {IMAGES} of {folder}")
    return np.array(sizes)


def small_crops(args: argparse.Namespace) -> tuple[Image.Image, str]:
    """As `histogram`."""
    image = read_image(args.image)
    rng, scale = np.random.default_rng(args.seed), tuple(args.small_scale)
    key, windows, valid = draw_small_crops(
        *image.shape[:2], rng, args.crop_min, scale, args.constrained, args.multi_crop
    )
    return draw_crops(image, key, windows, valid), (
        f"{sum(valid)} of {len(valid)} small crops have {args.constrained:g} of their area or more "
        "in the key's crop"
    )


if __name__ == "__main__":
    with exit_cleanly():
        main()
