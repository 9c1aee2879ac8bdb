"""Whether arrays can be the weights of a network, and the names that wrappers put before theirs."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moco_det.common.checkpoint_files import UnreadableFile

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_WEIGHT = re.compile(r"(^|[._])(weight|bias|running_mean|running_var|w|b|s|rm|riv|gamma|beta)$")
_VARIANCE = re.compile(r"(^|[._])(running_var|riv)$")  # the second is Caffe2's

# Before every name: what torch.nn.DataParallel and Lightning's modules call the model within.
_HEADS = ("module.", "model.")
_COMPILED = "_orig_mod."  # torch.compile's, before whatever was compiled


def checked_weights(path: str | Path, arrays: Mapping[object, object]) -> dict[str, Tensor]:
    """The arrays of a file as a network takes them: finite, floats of any width as float32.

    Counters (BN's batches, the queue's position) are whole numbers and stay what they are.

    Args:
        path: of the file, for messages.
        arrays: name -> tensor of torch or array of NumPy.

    Raises:
        UnreadableFile: names the array that is none of numbers, is empty, is not finite, is a
            weight of whole numbers, or a variance below zero.
    """
    weights = {str(name): _checked(path, str(name), value) for name, value in arrays.items()}
    if len(weights) < len(arrays):
        raise UnreadableFile(f"{path} has two arrays of one name")
    return weights


def _checked(path: str | Path, name: str, value: object) -> Tensor:
    def refuse(why: str) -> UnreadableFile:
        shown = name if len(name) <= 100 else f"{name[:60]}...{name[-37:]}"
        return UnreadableFile(f"{path}: {shown} {why}")

    if isinstance(value, np.ndarray | np.generic):
        value = torch.tensor(_supported(value))
    if not isinstance(value, Tensor):
        raise refuse(f"is a {type(value).__name__}, not an array of numbers")
    if value.numel() == 0:
        raise refuse(f"is empty: its shape is {tuple(value.shape)}")
    if value.dtype not in FLOATS:
        is_count = value.numel() == 1 and value.dtype != torch.bool and not value.is_complex()
        if not is_count or _WEIGHT.search(name):
            raise refuse(f"holds values of type {_name(value)}, where a weight is of float32")
        if not 0 <= int(value) < 2**53:
            raise refuse(f"is a count, but its value is {int(value)}")
        return value
    value = value.detach().float()
    if not value.isfinite().all():
        found = value[~value.isfinite()][0].item()
        raise refuse(f"is not finite: it holds {found}. Take an earlier checkpoint")
    if _VARIANCE.search(name) and value.min() < 0:
        raise refuse(f"is a variance, but holds {value.min().item():.4g}")
    return value


def _supported(value: np.ndarray | np.generic) -> np.ndarray | np.generic:
    """torch has computed little with unsigned integers of more than 8 bits until now."""
    return value.astype(np.int64) if value.dtype.kind == "u" and value.itemsize > 1 else value


def _name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


# -- wrappers -------------------------------------------------------------------------------------


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Name of the file -> name without what torch.compile, DataParallel and Lightning put before.

    A file in which two names would become one is left as it is.
    """
    names = list(names)
    stripped = {name: name.replace(_COMPILED, "") for name in names}
    heads = list(_HEADS)
    while heads:
        head = heads.pop(0)
        if any(name.startswith(head) for name in stripped.values()):
            stripped = {name: new.removeprefix(head) for name, new in stripped.items()}
            heads = list(_HEADS)
    return stripped if len(set(stripped.values())) == len(names) else {n: n for n in names}


def describe_stripping(names: Mapping[str, str]) -> str:
    """One line about the names that `names` (old -> new) shortens, or ""."""
    parts = Counter(_removed(old, new) for old, new in names.items() if len(new) < len(old))
    said = ", ".join(f"{part!r} from {count} names" for part, count in parts.most_common(3))
    return f"stripped {said}" if said else ""


def _removed(old: str, new: str) -> str:
    """The parts of the name `old` that `new` lacks: what is before it, and torch.compile's."""
    plain = old.replace(_COMPILED, "")
    head = plain[: len(plain) - len(new)] if plain.endswith(new) else ""
    compiled = _COMPILED if _COMPILED in old else ""
    return head + compiled if not old.startswith(_COMPILED) else compiled + head


def shorten(items: Iterable[str], length: int = 120) -> str:
    """The first of some names or faults, as many as a line has room for."""
    items, shown = list(items), ""
    for index, item in enumerate(items):
        if index and len(shown) + len(item) > length:
            return f"{shown} and {len(items) - index} more"
        shown += (", " if index else "") + item[:length]
    return shown
