"""Weight files: written whole or not at all, and loaded into detectors without losing a name."""

import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moco_det.common.checkpoint_files import seal
from moco_det.common.errors import UserError, tells_of_a_worker
from moco_det.common.files import replacing
from moco_det.common.resnets import infer_architecture
from moco_det.common.weight_checks import shorten
from moco_det.common.weight_layouts import DETECTRON2, name_map, unknown_layout
from moco_det.weights.resnet import detectron2_weights

Checked = TypeVar("Checked")

SAFETENSORS = ".safetensors"


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
            where Detectron2 stops reading), `.safetensors` for that, else a torch file.
        content: what the file is to hold; tensors alone for safetensors.
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
            elif path.suffix == SAFETENSORS:
                file.write(_safetensors(content))
            else:
                torch.save(dict(content), file)
        except RuntimeError as error:  # how torch reports a full disk
            if tells_of_a_worker(error):
                raise
            raise OSError(str(error).splitlines()[0].split(". ")[0]) from error


def _safetensors(content: Mapping[str, Tensor]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError(
            f"a {SAFETENSORS} file needs safetensors: pip install 'moco_det[hub]'"
        ) from error
    arrays = {name: value.contiguous() for name, value in content.items()}
    return save(arrays, {"format": "pt"})  # which transformers and timm look for


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
        path: as for `detectron2_weights`.
        allow_missing: let arrays of the ResNet that the file lacks keep their initial values.

    Raises:
        UserError: the file is unreadable, its backbone not whole, holds another ResNet, or leaves
            an array of the ResNet (weights or running statistics) at its initial value.
    """
    weights, metadata = detectron2_weights(path)
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
    if not any(map(_is_resnet, weights)):
        advice = unknown_layout(weights)
    elif not any(name.endswith("running_mean") for name in weights):
        advice = "without running statistics only MODEL.RESNETS.NORM FrozenBN can take the file"
    raise UserError(f"{path} leaves arrays of the backbone at random values: {shown}; {advice}")
