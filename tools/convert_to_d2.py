"""Turn the ResNet of any checkpoint into Detectron2 weights, or others' weights, and prove it.

    python tools/convert_to_d2.py checkpoint_last.pth.tar weights.pkl
    python tools/convert_to_d2.py moco_v2_200ep weights.pkl
    python tools/convert_to_d2.py weights.pkl resnet50.pth --to torchvision
    python tools/convert_to_d2.py densecl.pth densecl.safetensors --to timm

IN is a file, an address or a name, and of any layout that is known; the first line says which. The
backbone that Detectron2's weights go into is built by the native engine, with Detectron2's names;
OUT is written only if its features res2 to res5 equal the source network's.
"""

import argparse

try:
    from moco_det.common.errors import command_parser, exit_cleanly, start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from moco_det.common.official_weights import OFFICIAL
from moco_det.weights import SUFFIXES


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    known = "a file, https://..., hf://ORGANISATION/REPOSITORY/FILE, torchvision://resnet50, "
    add("source", metavar="IN", help=f"{known}{', '.join(OFFICIAL)}")
    ends = "; ".join(f"{name}: {' or '.join(suffixes)}" for name, suffixes in SUFFIXES.items())
    add("out", metavar="OUT", help=f"the new file; {ends}")
    add("--to", choices=SUFFIXES, default="detectron2", help="what is to load it")
    add("-v", "--verbose", action="store_true", help="list every key")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

from pathlib import Path

from torch import nn

from moco_det.common.files import make_folder
from moco_det.common.resnets import Architecture
from moco_det.native.modeling.backbones import ResNet
from moco_det.weights.conversion import TARGETS, convert_file


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with exit_cleanly():
        make_folder(Path(args.out).parent, "OUT")
        conversion = convert_file(args.source, args.out, args.to, build_backbone)
        print(conversion.describe(args.verbose))
        print(f"written: {args.out}")
        print("the config must say:" if args.to == "detectron2" else f"{args.to} needs:")
        for key, value in TARGETS[args.to].needs(conversion.source.architecture).items():
            print(f"  {key}: {value}")


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
