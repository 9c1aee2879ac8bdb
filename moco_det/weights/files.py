"""Weight files: read without running code that they may hold, written whole or not at all."""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from iopath.common.file_io import HTTPURLHandler, PathManager
from torch import Tensor

from moco_det.common.errors import UserError
from moco_det.common.files import replacing
from moco_det.weights.names import name_map

Checked = TypeVar("Checked")

MODEL_ZOO = ("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read the arrays of a weight file without running any code it may hold.

    Known forms: a dict with the arrays under "model" (Detectron2), "state_dict" (MoCo) or "blobs"
    (Detectron1), or a bare dict of arrays. `.pkl` is a pickle of NumPy arrays, all else torch's.

    Args:
        path: a local file, a URL, or "detectron2://..." for a file of Detectron2's model zoo.

    Returns:
        weights: name -> CPU tensor. Caffe2's names of a ResNet become Detectron2's; other names are
            the file's own.
        metadata: the file's other entries.

    Raises:
        UserError: no such file, an unsafe or a damaged one, or no arrays in it.
    """
    local = _local_path(str(path))
    content = read_pickle(local) if local.suffix == ".pkl" else _read_torch(local)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of arrays")
    keys = ("model", "state_dict", "blobs")
    key = next((k for k in keys if isinstance(content.get(k), Mapping)), None)
    arrays = content[key] if key else content
    metadata = {k: v for k, v in content.items() if k != key} if key else {}
    # D1's optimizer state travels among its arrays.
    arrays = {k: v for k, v in arrays.items() if not str(k).endswith("_momentum")}
    weights = {str(name): _tensor(path, name, value) for name, value in arrays.items()}
    if not weights:
        raise UserError(f"{path} holds no arrays")
    names = name_map("caffe2", "detectron2")
    if not names.keys().isdisjoint(weights):
        metadata["__author__"] = "Caffe2"  # Detectron2's mark of such a file
        weights = {names.get(name, name): value for name, value in weights.items()}
    return weights, metadata


def _tensor(path, name: str, value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub":
        return torch.tensor(value)
    raise UserError(f"{path}: {name} is a {type(value).__name__}, not an array of numbers")


def _local_path(path: str) -> Path:
    """The file itself, downloaded first (once, to iopath's cache) where `path` is a URL."""
    url = path.replace(*MODEL_ZOO) if path.startswith(MODEL_ZOO[0]) else path
    if not url.startswith(("http://", "https://")):
        if not Path(path).is_file():
            raise UserError(f"no weight file at {path}")
        return Path(path)
    manager = PathManager()
    manager.register_handler(HTTPURLHandler())
    try:
        return Path(manager.get_local_path(url))
    except Exception as error:  # whatever the network and its libraries raise
        raise UserError(
            f"cannot download {path} ({error}): fetch {url} by other means and name the local file"
        ) from error


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {found[1]}" if found else "it is damaged or no torch file"
        raise UserError(f"{path} cannot be read safely: {what}") from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(f"{path} is damaged or no torch file: {_first_line(error)}") from error


def read_pickle(path: Path) -> object:
    """A pickle of NumPy arrays and plain containers, read without running code it may hold.

    Raises:
        UserError: the file is unsafe or damaged.
    """
    try:
        with open(path, "rb") as file:
            # latin1 is how arrays pickled by Python 2 (Caffe2's files) keep their bytes.
            return _ArrayUnpickler(file, encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{path} cannot be read safely: {error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is damaged or no pickle: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, by which old pickle protocols write bytes."""
    return text.encode("latin1")


_ARRAY = np.empty(1)
_REBUILD = {
    "multiarray._reconstruct": _ARRAY.__reduce__()[0],
    "multiarray.scalar": _ARRAY[0].__reduce__()[0],
    "numeric._frombuffer": _ARRAY.__reduce_ex__(5)[0],
}
_SAFE_GLOBALS = {
    "collections.OrderedDict": OrderedDict,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "builtins.bytearray": bytearray,
    "__builtin__.bytearray": bytearray,
    "_codecs.encode": _encode,
    # NumPy 2 renamed numpy.core; a file names either, whatever version reads it.
    **{f"numpy.core.{name}": rebuild for name, rebuild in _REBUILD.items()},
    **{f"numpy._core.{name}": rebuild for name, rebuild in _REBUILD.items()},
}


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays and plain containers; refuses any other global without importing it."""

    def find_class(self, module: str, name: str):
        wanted = f"{module}.{name}"
        if wanted not in _SAFE_GLOBALS:
            raise UserError(f"it asks for {wanted}, which does not belong in a file of arrays")
        return _SAFE_GLOBALS[wanted]


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
        path: `.pkl` for a pickle (its tensors become NumPy arrays), else a torch file.
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
    with open(path, "wb") as file:
        try:
            if path.suffix == ".pkl":
                _ArrayPickler(file, protocol=4).dump(_with_arrays(content))
            else:
                torch.save(dict(content), file)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(_first_line(error)) from error


def _with_arrays(value: object) -> object:
    if isinstance(value, Mapping):
        return {k: _with_arrays(v) for k, v in value.items()}
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # NumPy has none
