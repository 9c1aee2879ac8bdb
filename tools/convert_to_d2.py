"""Turn a MoCo checkpoint or a torchvision ResNet into Detectron2 weights, or back, and prove it.

    python tools/convert_to_d2.py checkpoint_last.pth.tar weights.pkl
    python tools/convert_to_d2.py weights.pkl resnet50.pth --to torchvision

The backbone that the weights go into is built by the native engine, with Detectron2's names; OUT is
written only if its features res2 to res5 equal the source network's.
"""

from moco_det.common.ending import start_command

if __name__ == "__main__":
    start_command()  # before the imports that take seconds

import argparse
from pathlib import Path

from torch import nn

from moco_det.common.errors import command_parser, exit_cleanly
from moco_det.common.files import make_folder
from moco_det.native.modeling.backbones import ResNet
from moco_det.weights.conversion import convert_file
from moco_det.weights.names import Architecture


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with exit_cleanly():
        make_folder(Path(args.out).parent, "OUT")
        conversion = convert_file(args.source, args.out, args.to, build_backbone)
        print(conversion.describe(args.verbose))
        print(f"written: {args.out}")
        if args.to == "detectron2":
            print("the config must say:")
            for key, value in conversion.source.architecture.config().items():
                print(f"  {key}: {value}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    known = "MoCo checkpoint (.pth.tar), torchvision state_dict (.pth) or Detectron2 file"
    add("source", metavar="IN", help=known)
    add("out", metavar="OUT", help=".pkl or .pth for Detectron2, .pth for torchvision")
    add("--to", choices=("detectron2", "torchvision"), default="detectron2")
    add("-v", "--verbose", action="store_true", help="list every key")
    return parser.parse_args(arguments)


def build_backbone(architecture: Architecture) -> nn.Module:
    return ResNet(
        architecture.depth,
        out_features=["res2", "res3", "res4", "res5"],
        norm="BN",
        freeze_at=0,
        stride_in_1x1=False,
        groups=architecture.groups,
        width_per_group=architecture.width_per_group,
        stem_channels=architecture.stem_channels,
        res2_channels=architecture.res2_channels,
    )


if __name__ == "__main__":
    main()
