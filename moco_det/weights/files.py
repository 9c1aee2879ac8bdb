"""Weight files: read without running code that they may hold, written whole or not at all."""

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from iopath.common.file_io import HTTPURLHandler, PathManager
from torch import Tensor

from moco_det.common.checkpoint_files import UnreadableFile, read_checkpoint, seal
from moco_det.common.errors import UserError
from moco_det.common.files import replacing
from moco_det.common.weight_checks import checked_weights
from moco_det.weights.names import name_map

Checked = TypeVar("Checked")

MODEL_ZOO = ("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read the arrays of a weight file without running any code it may hold.

    Known forms: a dict with the arrays under "model" (Detectron2), "state_dict" (MoCo) or "blobs"
    (Detectron1), or a bare dict of arrays.

    Args:
        path: a local file, a URL, or "detectron2://..." for a file of Detectron2's model zoo.

    Returns:
        weights: name -> CPU tensor, finite and float32 but for counters. Caffe2's names of a ResNet
            become Detectron2's; other names are the file's own.
        metadata: the file's other entries.

    Raises:
        UserError: no such file, an unsafe or a damaged one, no arrays in it, or an array that is no
            weight (see `moco_det.common.weight_checks`).
    """
    content = read_checkpoint(_local_path(str(path)))
    if not isinstance(content, Mapping):
        raise UnreadableFile(f"{path} holds a {type(content).__name__}, not a dict of arrays")
    keys = ("model", "state_dict", "blobs")
    key = next((k for k in keys if isinstance(content.get(k), Mapping)), None)
    arrays = content[key] if key else content
    metadata = {k: v for k, v in content.items() if k != key} if key else {}
    # D1's optimizer state travels among its arrays.
    arrays = {k: v for k, v in arrays.items() if not str(k).endswith("_momentum")}
    weights = checked_weights(path, arrays)
    if not weights:
        raise UnreadableFile(f"{path} holds no arrays")
    names = name_map("caffe2", "detectron2")
    if not names.keys().isdisjoint(weights):
        metadata["__author__"] = "Caffe2"  # Detectron2's mark of such a file
        weights = {names.get(name, name): value for name, value in weights.items()}
    return weights, metadata


def _local_path(path: str) -> Path:
    """The file itself, downloaded first (once, to iopath's cache) where `path` is a URL."""
    url = path.replace(*MODEL_ZOO) if path.startswith(MODEL_ZOO[0]) else path
    if not url.startswith(("http://", "https://")):
        if not os.path.exists(path) or os.path.isdir(path):
            raise UnreadableFile(f"no weight file at {path[:200]}")
        return Path(path)
    manager = PathManager()
    manager.register_handler(HTTPURLHandler())
    try:
        return Path(manager.get_local_path(url))
    except Exception as error:  # whatever the network and its libraries raise
        raise UserError(
            f"cannot download {path} ({error}): fetch {url} by other means and name the local file"
        ) from error


class _ArrayPickler(pickle.Pickler):
    """Writes arrays by the name `numpy.ndarray` alone, which every version of NumPy knows.

    NumPy's own reduction names `numpy._core`, which the NumPy that many Detectron2 installations
    have cannot import.
    """

    def reducer_override(self, value):
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def write_weights(
    path: str | Path,
    content: Mapping[str, object],
    check: Callable[[Path], Checked] = lambda written: None,
) -> Checked:
    """Write a weight file whole or not at all: to a temporary name first, then renamed.

    Args:
        path: `.pkl` for a pickle, whose tensors become NumPy arrays (a checksum follows its end,
            where Detectron2 stops reading), else a torch file.
        content: what the file is to hold.
        check: called with the temporary file before it gets its name; may raise.

    Returns:
        What `check` returned.

    Raises:
        UserError: the file cannot be written. Nothing new is left in the folder, then or when
            `check` raises, and an earlier file of the same name stays.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            _write(temporary, content)
            return check(temporary)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def _write(path: Path, content: Mapping[str, object]) -> None:
    with open(path, "w+b") as file:
        try:
            if path.suffix == ".pkl":
                _ArrayPickler(file, protocol=4).dump(_with_arrays(content))
                seal(file)
            else:
                torch.save(dict(content), file)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(str(error).splitlines()[0].split(". ")[0]) from error


def _with_arrays(value: object) -> object:
    if isinstance(value, Mapping):
        return {k: _with_arrays(v) for k, v in value.items()}
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # NumPy has none
