"""Weight files: read without running code that they may hold, written whole or not at all."""

import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from iopath.common.file_io import HTTPURLHandler, PathManager
from torch import Tensor, nn

from moco_det.common.checkpoint_files import UnreadableFile, read_checkpoint, seal
from moco_det.common.errors import UserError
from moco_det.common.files import replacing
from moco_det.common.processes import print_on_main
from moco_det.common.weight_checks import checked_weights, describe_stripping, shorten, unwrapped
from moco_det.weights.names import DETECTRON2, find_wrapped_layout, infer_architecture, name_map

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


# -- into detectors, without losing a name on the way ----------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What became of every name, as `load_backbone_weights` left it."""

    path: str
    loaded: tuple[str, ...]  # the model's names that now hold the file's values
    missing: tuple[str, ...]  # the model's names that keep their initial values
    unexpected: tuple[str, ...]  # the file's names that nothing in the model takes
    skipped: tuple[str, ...]  # heads of another shape, each with both shapes
    metadata: dict[str, object]

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.loaded)} arrays loaded"]
        lines += [f"not loaded: {line}" for line in self.skipped]
        for title, names in (
            ("keep their initial values", self.missing),
            ("unused", self.unexpected),
        ):
            if names:
                modules = sorted({name.rpartition(".")[0] for name in names})
                shown = ", ".join(modules[:6]) + (", ..." if len(modules) > 6 else "")
                lines.append(f"{len(names)} {title}: {shown}")
        return "\n".join(lines)


def load_backbone_weights(
    model: nn.Module, path: str | Path, allow_missing: bool = False
) -> LoadReport:
    """Load a converted backbone, a model-zoo file or a whole detector into `model`; say so.

    Names are matched as Detectron2 matches them: an array of the model takes the longest name of
    the file that is its own name or, after a dot, the end of it ("res5.0.conv1.weight" of the file
    fits "backbone.bottom_up.res5.0.conv1.weight" of an FPN model and
    "roi_heads.res5.0.conv1.weight" of a C4 model). An array outside the ResNet whose shape differs
    (a predictor of another number of classes) is skipped.

    Args:
        model: a detector or backbone with Detectron2's names; changed in place.
        path: as for `read_state_dict`.
        allow_missing: let arrays of the ResNet that the file lacks keep their initial values.

    Raises:
        UserError: the file is unreadable or needs converting first, holds another ResNet, or leaves
            an array of the ResNet (weights or running statistics) at its initial value.
    """
    weights, metadata = _read_detectron2(path)
    state = model.state_dict()
    _check_same_resnet(path, state, weights)
    matches = _match(state, weights)
    values = {name: weights[match] for name, match in matches.items()}
    values |= _affine_statistics(model, values, weights)
    differing = {n: v for n, v in values.items() if v.shape != state[n].shape}
    skipped = tuple(
        f"{name} has the shape {tuple(value.shape)}, not {tuple(state[name].shape)}"
        for name, value in differing.items()
    )
    if any(map(_is_resnet, differing)):
        wrong = "; ".join(skipped[:2]) + (f" and {len(skipped) - 2} more" if skipped[2:] else "")
        raise UserError(f"{path} does not fit the config: {wrong}")
    values = {name: value for name, value in values.items() if name not in differing}
    missing = tuple(name for name in state if name not in values and not _is_counter(name))
    if not allow_missing:
        _refuse_missing(path, weights, [name for name in missing if _is_resnet(name)])
    model.load_state_dict(values, strict=False)
    unused = weights.keys() - set(matches.values())
    unexpected = tuple(sorted(name for name in unused if not _is_counter(name)))
    report = LoadReport(str(path), tuple(values), missing, unexpected, skipped, metadata)
    if not (dist.is_initialized() and dist.get_rank()):
        print(report, flush=True)
    return report


def _read_detectron2(path: str | Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    weights, metadata = read_state_dict(path)
    layout, names = find_wrapped_layout(weights)
    if layout is not None and layout.vocabulary == "torchvision":
        raise UserError(
            f"{path} is a {layout.title}; convert it first: "
            f"python tools/convert_to_d2.py {path} weights.pkl"
        )
    if layout is None or all(name.startswith("module.") for name in weights):
        names = unwrapped(weights)
    stripping = describe_stripping(names)
    if stripping:
        print_on_main(f"{path}: {stripping}")
    return {names[name]: value for name, value in weights.items()}, metadata


def _is_counter(name: str) -> bool:
    return name.endswith(".num_batches_tracked")  # no network's output depends on it


def _is_resnet(name: str) -> bool:
    return DETECTRON2.strip(name) is not None and not _is_counter(name)


def _match(wanted: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Name of the model -> name of the file; names of the model without one are left out."""
    names, matches = set(names), {}
    for name in wanted:
        parts = name.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))  # longest first
        matches[name] = next((end for end in ends if end in names), None)
    matches = {name: match for name, match in matches.items() if match is not None}
    twice = [match for match, n in Counter(matches.values()).items() if n > 1]
    if twice:
        raise UserError(f"{twice[0]} fits several arrays of the model, so it cannot be loaded")
    return matches


def _resnet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays of the ResNet under torchvision's names."""
    names = name_map("detectron2", "torchvision")
    stripped = {DETECTRON2.strip(name): value for name, value in weights.items()}
    return {names[name]: value for name, value in stripped.items() if name is not None}


def _check_same_resnet(path, state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    held, wanted = infer_architecture(_resnet(weights)), infer_architecture(_resnet(state))
    if held is not None and wanted is not None and held != wanted:
        raise UserError(
            f"{path} holds a {held}, the config asks for a {wanted} "
            f"(MODEL.RESNETS.DEPTH {wanted.depth}): name other weights or set DEPTH {held.depth}"
        )


def _affine_statistics(
    model: nn.Module, values: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Running statistics for frozen BN from a file whose BN is folded into scale and shift.

    Caffe2's files are such. Detectron2 gives them mean 0 and variance 1, which differs from the
    pure scale and shift by the layer's epsilon; so does this.
    """
    if any(name.endswith("running_mean") for name in weights):
        return {}
    buffers = dict(model.named_buffers())  # a frozen BN is one whose weight is a buffer
    filled = {}
    for name, value in buffers.items():
        layer, _, kind = name.rpartition(".")
        weight = f"{layer}.weight"
        if kind in ("running_mean", "running_var") and weight in buffers and weight in values:
            filled[name] = torch.full_like(value, float(kind == "running_var"))
    return filled


def _refuse_missing(path, weights: Mapping[str, Tensor], missing: list[str]) -> None:
    if not missing:
        return
    shown = shorten(missing)
    advice = "convert the checkpoint again or name other weights"
    if not any(name.endswith("running_mean") for name in weights):
        advice = "without running statistics only MODEL.RESNETS.NORM FrozenBN can take the file"
    raise UserError(f"{path} leaves arrays of the backbone at random values: {shown}; {advice}")
