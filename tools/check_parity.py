#!/usr/bin/env python
"""Compare the native engine with Detectron2, number for number, on the detector of one YAML.

python tools/check_parity.py --config-file configs/X.yaml
python tools/check_parity.py --config-file configs/X.yaml --weights output/model_final.pth

Both engines get the same weights, the same drawn images and the same sampled anchors and proposals.
Gradients are computed in float64, because rounding would decide on which side of a ReLU some values
lie; everything else in float32. Needs Detectron2, but no data set.
"""

import argparse

try:
    from moco_det.common.errors import (
        UserError,
        at_least,
        command_parser,
        exit_cleanly,
        start_command,
    )
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from moco_det.config.flags import add_config_arguments


def parse(arguments: list[str] | None) -> argparse.Namespace:
    codes = "0 all within the tolerance; 1 a larger difference, or an error"
    parser = command_parser(__doc__, codes)
    add_config_arguments(parser)
    add = parser.add_argument
    add("--weights", metavar="FILE",
        help="converted backbone or detector (default: random weights)")  # fmt: skip
    add("--image-size", type=int, nargs=2, default=(64, 96), metavar=("H", "W"), help="pixels")
    add("--images", type=int, default=2, metavar="N", help="drawn images of the batch")
    add("--seed", type=at_least(0, 2**32 - 1), default=0, help="of images, weights and samples")
    add("--tolerance", type=float, default=1e-4, help="largest relative difference")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

import torch

from moco_det.config.loading import load_config
from moco_det.engines import require_detectron2
from moco_det.native.engine.inference import Probe
from moco_det.parity import comparison as parity
from moco_det.weights.files import load_backbone_weights

SMALLEST_SIDE = 64  # pixels: the coarsest map of a pyramid keeps more than one position
LARGEST = 10_000  # sides, and images


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with exit_cleanly():
        check(args)


def check(args: argparse.Namespace) -> None:
    """Print the comparison.

    Raises:
        UserError: a quantity differs by more than the tolerance, or bad input.
    """
    wrong = min(args.image_size) < SMALLEST_SIDE or args.images < 1
    if wrong or max(*args.image_size, args.images) > LARGEST:
        raise UserError(
            f"--image-size {args.image_size[0]} {args.image_size[1]} --images {args.images}: "
            f"at least one image, and {SMALLEST_SIDE} pixels in height and width, and at most "
            f"{LARGEST:,} of each"
        )
    require_detectron2()
    from moco_det.plugin.probe import Probe as Detectron2Probe  # only where it can be imported

    cfg = load_config(args.config_file, args.opts)
    items = parity.build_items(cfg, *args.image_size, args.images, args.seed)
    torch.manual_seed(args.seed)
    native = Probe(args.config_file, args.opts)
    random = native.model.state_dict().keys()
    if args.weights:
        random = load_backbone_weights(native.model, args.weights).missing
    parity.randomize_for_parity(native.model, items, random, args.seed)
    reference = Detectron2Probe(args.config_file, args.opts)
    reference.model.load_state_dict(native.model.state_dict(), strict=True)

    differences = parity.compare(
        reference.quantities(items, args.seed), native.quantities(items, args.seed)
    )
    print(parity.table(differences, args.tolerance))
    worse = [x.quantity for x in differences if not x.within(args.tolerance)]
    if worse:
        raise UserError(
            f"{len(worse)} of {len(differences)} quantities differ by more than {args.tolerance:g} "
            f"between the engines: {', '.join(worse)}"
        )
    print(f"all {len(differences)} quantities agree to {args.tolerance:g}")


if __name__ == "__main__":
    main()
