"""What stands in for NumPy's and torch's own functions while a pickle is interpreted.

A pickle asks for functions by name; `CALLS` has what is called in their place. Each notes what an
array would be made of, and makes none: `moco_det.common.checkpoint_files` does, once it has
compared the notes with the bytes that there are.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class Fault(Exception):
    """What is wrong with a file, in words that follow its name."""


class UnsafeName(Fault):
    """The file asks for something that does not belong in a file of arrays."""


# -- what a file may hold beside plain values ------------------------------------------------------


@dataclass(eq=False)
class Reference:
    """A name that the file asked for; `call` is what stands in for calling it, if that is known."""

    name: str
    call: Callable[..., Any] | None = None


@dataclass(eq=False)
class DType:
    """NumPy's, by its letter and width such as "f4"; `code` is the file's own spelling."""

    code: str

    @property
    def letters(self) -> str:
        return self.code.lstrip("<|=")


@dataclass(eq=False)
class NumpyArray:
    """What a NumPy array is to be made of; not compared with each other yet."""

    dtype: DType | None = None
    shape: Any = ()
    data: Any = None
    fortran: bool = False


@dataclass(eq=False)
class Storage:
    """Numbers of one dtype, to which torch's tensors are views; `tensor` is filled in by who reads
    the file. `dtype` is None for kinds that no weight has."""

    dtype: torch.dtype | None
    key: str
    count: int
    tensor: torch.Tensor | None = None


@dataclass(eq=False)
class TensorView:
    """What a tensor of torch is to be made of; not compared with its storage yet."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any


@dataclass(eq=False)
class OddTensor:
    """A tensor that is no plain array of numbers; `kind` as in "is a sparse tensor"."""

    kind: str


class Opaque(dict):
    """An object of another package, such as the flags of a run: its attributes and items alone.

    Nothing is made of what it is called with.
    """

    def __init__(self, *arguments: Any):
        super().__init__()


# Packages whose objects travel beside the arrays in the checkpoints of others: flags, configs,
# paths, histories. They become plain dicts.
OPAQUE = {
    "argparse", "pathlib", "typing", "easydict", "omegaconf", "yacs", "fvcore", "mmcv", "mmengine",
    "lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "pl_bolts",
}  # fmt: skip


# -- stand-ins ------------------------------------------------------------------------------------


def _dtype(code: Any = None, *flags: Any) -> DType:
    if not isinstance(code, str):
        raise Fault("a dtype of NumPy has no letters")
    return DType(code)


def _ndarray(shape: Any, dtype: Any = None, data: Any = None, *more: Any) -> NumpyArray:
    if more:
        raise Fault("an array of NumPy has an offset or strides of its own")
    return NumpyArray(dtype if isinstance(dtype, DType) else _dtype(dtype), shape, data)


def _reconstruct(kind: Any, *rest: Any) -> NumpyArray:
    if not (isinstance(kind, Reference) and kind.name == "numpy.ndarray"):
        raise Fault("an array of NumPy is of another class than ndarray")
    return NumpyArray()


def _scalar(dtype: Any, data: Any = None) -> NumpyArray:
    return NumpyArray(dtype, (), data)


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> NumpyArray:
    return NumpyArray(dtype, shape, data, order == "F")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> TensorView:
    return TensorView(storage, offset, shape, stride)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _subclass(function: Any, kind: Any, arguments: Any, state: Any = None) -> Any:
    if not (isinstance(function, Reference) and function.call):
        raise Fault("a tensor is made by something that is no function")
    return function.call(*arguments)


def _odd(kind: str) -> Callable[..., OddTensor]:
    return lambda *rest: OddTensor(kind)


def _newer_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> OddTensor:
    dtype = rest[2].name if len(rest) > 2 and isinstance(rest[2], Reference) else "a newer dtype"
    return OddTensor(f"tensor of {dtype}")


def _dictionary(items: Any = ()) -> dict:
    pairs = items.items() if isinstance(items, dict) else items
    return {checked_key(key): value for key, value in pairs}


_TORCH = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _newer_tensor,
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter,
    "_rebuild_sparse_tensor": _odd("sparse tensor"),
    "_rebuild_sparse_csr_tensor": _odd("sparse tensor"),
    "_rebuild_qtensor": _odd("quantized tensor"),
    "_rebuild_meta_tensor_no_storage": _odd("meta tensor, without values"),
    "_rebuild_nested_tensor": _odd("nested tensor"),
    "_rebuild_wrapper_subclass": _odd("tensor of a class of its own"),
    "_rebuild_device_tensor_from_numpy": _odd("tensor of another device"),
    "_rebuild_device_tensor_from_cpu_tensor": _odd("tensor of another device"),
}
_NUMPY = {
    "multiarray._reconstruct": _reconstruct,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _frombuffer,
}
STORAGES = {
    f"torch.{device}{kind}Storage": dtype
    for device in ("", "cuda.")
    for kind, dtype in {
        "Float": torch.float32, "Double": torch.float64, "Half": torch.float16,
        "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
        "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
        "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    }.items()
}  # fmt: skip
CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.Counter": lambda items=(): Counter(_dictionary(items)),
    "builtins.set": lambda items=(): set(map(checked_key, items)),
    "__builtin__.set": lambda items=(): set(map(checked_key, items)),
    "torch.Size": tuple,
    "torch.device": lambda *parts: ":".join(map(str, parts)),
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.serialization._get_layout": lambda name: name,
    "numpy.ndarray": _ndarray,
    "numpy.dtype": _dtype,
    **{f"torch._utils.{name}": call for name, call in _TORCH.items()},
    # NumPy 2 renamed numpy.core; a file names either, whatever version reads it.
    **{f"numpy.core.{name}": call for name, call in _NUMPY.items()},
    **{f"numpy._core.{name}": call for name, call in _NUMPY.items()},
}
MENTIONED = {  # arguments of others, which are never called
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.storage.UntypedStorage",
    "torch.storage.TypedStorage",
    *STORAGES,
    *(f"builtins.{kind}" for kind in ("bool", "dict", "float", "int", "list", "object", "str")),
    *(f"torch.{n}" for n, v in vars(torch).items() if isinstance(v, torch.dtype | torch.qscheme)),
    *(f"torch.{name}.{kind}Storage" for name in ("cuda", "_C") for kind in ("Untyped", "Typed")),
    *(f"torch.{kind}Storage" for kind in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")),
}


def checked_key(value: Any) -> Any:
    """A tuple would be hashed to whatever depth the file gave it."""
    if not isinstance(value, str | bytes | int | float | None):
        raise Fault(f"a dict has a key that is a {type(value).__name__}, not a name")
    return value
