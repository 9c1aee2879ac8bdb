"""Detectron2's own config, with this project's few keys."""

import re

from detectron2.config import CfgNode, get_cfg

from moco_det import config as native_config
from moco_det.config import leaves, nearest, on_available_device
from moco_det.config_keys import OUR_KEYS
from moco_det.errors import UserError


def add_moco_config(cfg: CfgNode) -> None:
    """Add `moco_det.config_keys.OUR_KEYS`, with their defaults, to a Detectron2 config."""
    defaults = dict(leaves(native_config.get_cfg()))
    for key in OUR_KEYS:
        section, _, name = key.rpartition(".")
        node = cfg
        for part in filter(None, section.split(".")):
            node = node[part]
        node[name] = defaults[key]


def load_config(config_file: str, opts=()) -> CfgNode:
    """A YAML file over Detectron2's defaults, then the `KEY VALUE ...` list `opts` over both.

    Frozen. MODEL.DEVICE becomes "cpu" where it asks for CUDA and there is none.

    Raises:
        UserError: an unreadable file, an unknown key (with the nearest known one), a wrong type.
    """
    cfg = get_cfg()
    add_moco_config(cfg)
    try:
        cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, AssertionError, OSError) as error:
        message = " ".join(str(error).replace("'", "").split())
        unknown = re.search(r"Non-existent (?:config )?key: (\S+)", message)
        if unknown:
            close = nearest(unknown[1], [key for key, _ in leaves(cfg)])
            message = f"unknown key {unknown[1]}; the nearest is {close}"
        raise UserError(f"config {config_file}: {message}") from error
    cfg = on_available_device(cfg)
    cfg.freeze()
    return cfg
