"""Flags that name a config: --config-file, and KEY VALUE pairs that override its keys."""

import argparse

from moco_det.common.installation import yaml_path


def add_config_arguments(
    parser: argparse.ArgumentParser, required: bool = True, help: str = "YAML config"
) -> None:
    """--config-file FILE, and KEY VALUE pairs after all flags (`args.opts`)."""
    add_config_file(parser, required, help)
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        action=_Pairs,
        metavar="KEY VALUE",
        help="config keys to override (default: none)",
    )


def add_config_file(
    parser: argparse._ActionsContainer, required: bool = False, help: str = "YAML config"
) -> None:
    """--config-file FILE alone, for a parser or a group of one."""
    parser.add_argument(
        "--config-file", type=yaml_path, required=required, metavar="FILE", help=help
    )


def add_config_option(
    parser: argparse.ArgumentParser, help: str = "config keys to override"
) -> None:
    """KEY VALUE pairs as a flag, --opts, which others may follow."""
    help += " (default: none)"
    parser.add_argument(
        "--opts", nargs="+", default=[], action=_Pairs, metavar="KEY VALUE", help=help
    )


class _Pairs(argparse.Action):
    """Stores KEY VALUE pairs; argparse takes all that follows them for more, flags too."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        flags = [value for value in values if value.startswith("--")]
        if flags:
            parser.error(f"{flags[0]} comes after KEY VALUE pairs: put all flags before them")
        setattr(namespace, self.dest, values)
