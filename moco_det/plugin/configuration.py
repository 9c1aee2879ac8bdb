"""Detectron2's own config, with this project's few keys."""

import re
from collections.abc import Sequence

from detectron2.config import CfgNode, get_cfg

from moco_det.common.errors import UserError
from moco_det.config import loading as native_config
from moco_det.config.loading import KEYS, leaves, nearest, on_available_device
from moco_det.plugin import dense_pose


def add_moco_config(cfg: CfgNode) -> None:
    """Add the `own` keys of moco_det/config/keys.yaml, with their defaults, to a Detectron2 config.

    Also its `densepose` ones, where the DensePose project has not added them: this project's YAMLs
    say only there that they are of use, and can be read without it.
    """
    for key in KEYS["own"] + KEYS["densepose"]:
        section, _, name = key.rpartition(".")
        node, default = cfg, native_config.get_cfg()
        for part in filter(None, section.split(".")):
            node, default = node[part], default[part]
        if name not in node:
            value = default[name]
            node[name] = CfgNode(value) if isinstance(value, dict) else value


def asks_for_dense_pose(config_file: str, opts: Sequence[str]) -> bool:
    model = CfgNode.load_yaml_with_base(config_file).get("MODEL") or {}
    given = {"MODEL.DENSEPOSE_ON": model.get("DENSEPOSE_ON", False)}
    given |= zip(opts[::2], opts[1::2], strict=False)
    return str(given["MODEL.DENSEPOSE_ON"]) == "True"


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """A YAML file over Detectron2's defaults, then the `KEY VALUE ...` list `opts` over both.

    Frozen. MODEL.DEVICE becomes "cpu" where it asks for CUDA and there is none.

    Raises:
        UserError: an unreadable file, an unknown key (with the nearest known one), a wrong type;
            dense pose, and the DensePose project is not installed.
    """
    cfg = get_cfg()
    try:
        if asks_for_dense_pose(config_file, opts):
            dense_pose.add_config(cfg)
        add_moco_config(cfg)
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
