"""Where this project's own files are: in a checkout, or installed from a wheel.

A wheel has configs/ and tools/ within the package (see setup.py), since a folder `tools` among the
installed packages would be anybody's.
"""

import difflib
import os
from pathlib import Path

from moco_det.common.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
IN_PACKAGE = ("configs", "tools")  # of a wheel


def own_file(name: str) -> Path:
    """The file or folder of the project that a checkout has at `name`, "tools/train_net.py"."""
    installed = PACKAGE / "configs" / "README.md"
    inner = installed.exists() and name.split("/")[0] in IN_PACKAGE
    return (PACKAGE if inner else PACKAGE.parent) / name


def yaml_path(text: str) -> str:
    """A flag's YAML: the user's, or else the project's of this name, with or without "configs/".

    So the commands of the READMEs work in any folder, and `voc_R50_C4_24k_moco.yaml` is enough.
    """
    path = Path(text)
    inner = Path(*path.parts[path.parts[:1] == ("configs",) :])
    ours = own_file("configs") / inner
    is_name = path.suffix == ".yaml" and not path.is_absolute() and ".." not in path.parts
    return str(ours) if is_name and not os.path.lexists(path) and ours.is_file() else text


def config_file(name: str) -> str:
    """The path of one of the project's YAMLs, as Detectron2's `model_zoo.get_config_file` gives it.

    Args:
        name: relative to configs/, such as "voc_R50_C4_24k_moco.yaml".

    Raises:
        UserError: there is none of this name; with the nearest.
    """
    folder = own_file("configs")
    known = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise UserError(f"no config is called {name!r}; the nearest is {nearest[0]!r}")
    return str(folder / name)
