"""MoCo checkpoints to Detectron2 transfer tables."""

import warnings

from moco_det.common.installation import config_file as get_config_file

__version__ = "0.1.0"

__all__ = ["get_cfg", "get_config_file"]

# fvcore scripts two losses on import, which recent torch deprecates: noise that no user can act on.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)


def __getattr__(name: str):
    if name == "get_cfg":  # imported when it is asked for: it takes a second
        from moco_det.config import loading

        return loading.get_cfg
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
