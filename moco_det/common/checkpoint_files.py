"""The one reader of checkpoints and weight files: torch's formats, pickles of NumPy arrays, and
safetensors.

Everything in such a file is untrusted. What is read is checked before it is allocated, and after:
    form    a regular file; a zip whose checksums are right, or a pickle that asks for data only
            (`moco_det.common.safe_pickle`)
    size    an array has exactly the bytes that its shape and dtype need; a zip does not inflate
    kind    little-endian numbers: no sparse, quantized, meta or float8 tensors, no objects
Whether the arrays are the weights of a network is `moco_det.common.weight_checks`' question.

    file -> zip: data.pkl + storages | torch's older format | pickle -> interpreted -> arrays made
         -> safetensors, by the library of that name, which checks all of the above but the numbers:
            the format has no checksum
"""

import contextlib
import hashlib
import io
import math
import os
import re
import reprlib
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from moco_det.common.errors import UserError, one_line
from moco_det.common.files import NotRegularFile, open_regular
from moco_det.common.pickled_arrays import (
    STORAGES,
    Fault,
    NumpyArray,
    OddTensor,
    Opaque,
    Reference,
    Storage,
    TensorView,
    UnsafeName,
)
from moco_det.common.safe_pickle import BoundedFile, Interpreter

BLOCK = 1 << 20  # bytes read at a time
INFLATION = 3  # how many times its size a file may take in memory
MAX_DEPTH = 100  # of containers in containers
MAX_VALUES = 10_000_000  # counted as often as they are referred to

TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch's format before 1.6
SEAL = re.compile(rb"\n#sha256:([0-9a-f]{64})\n")  # after the pickles that `seal` has ended
SEAL_LENGTH = 74

NUMPY_LETTERS = {"b1", "f2", "f4", "f8", *(f"{sign}{n}" for sign in "iu" for n in (1, 2, 4, 8))}


class UnreadableFile(UserError):
    """A file that is damaged, hostile, or of another format; the message names it."""


def read_checkpoint(path: str | Path) -> Any:
    """The content of a checkpoint or weight file, without running code that it may hold.

    The format is told from the content. Tensors of torch come as CPU tensors, arrays of NumPy as
    NumPy's, in plain dicts, lists and tuples. At most three times the size of the file is taken.

    Raises:
        UnreadableFile: in one line what is wrong with the file.
    """
    try:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            return _read_safetensors(path) if _is_safetensors(file, size) else _read(file, size)
    except UnreadableFile:
        raise
    except UnsafeName as fault:
        raise UnreadableFile(f"{path} cannot be read safely: {fault}") from fault
    except Fault as fault:
        raise UnreadableFile(f"{path} is damaged or no checkpoint: {fault}") from fault
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise UnreadableFile(f"{path} does not fit into the memory of this machine") from error
    except Exception as error:  # a damaged file can lead to nearly any
        why = f"its pickle is malformed ({type(error).__name__})"
        raise UnreadableFile(f"{path} is damaged or no checkpoint: {why}") from error


def _open(path: str | Path) -> BinaryIO:
    """The file, open for reading. Raises Fault, or OSError where there is none."""
    try:
        return open_regular(path)
    except NotRegularFile as error:
        raise Fault("it is not a regular file") from error
    except ValueError as error:
        raise Fault("its name holds a NUL") from error


def _read(file: BinaryIO, size: int) -> Any:
    if size == 0:
        raise Fault("it is empty")
    if file.read(4) == b"PK\x03\x04":
        return _read_zip(file, size)
    file.seek(0)
    end = _sealed_length(file, size)
    interpreter = _LegacyInterpreter(BoundedFile(file, end))
    content = interpreter.load()
    if content == TORCH_MAGIC:
        content = interpreter.load_torch()
    if file.tell() != end:
        raise Fault(f"{end - file.tell()} bytes follow its end")
    return _Builder(end).build(content)


# -- safetensors ----------------------------------------------------------------------------------


def _is_safetensors(file: BinaryIO, size: int) -> bool:
    """Whether it begins with the length of a JSON object and that object."""
    begin = file.read(9)
    file.seek(0)
    return begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= size - 8


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    try:
        import safetensors
    except ImportError as error:
        raise UnreadableFile(
            f"{path} is a safetensors file, which needs safetensors: pip install 'moco_det[hub]'"
        ) from error
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise Fault(one_line(error, 200)) from error


# -- checksums of our own -------------------------------------------------------------------------


def seal(file: BinaryIO) -> None:
    """End a pickle that was written to `file` with the checksum of all its bytes.

    Unpicklers stop before it, Detectron2's among them. `file` must be readable as well.
    """
    length = file.tell()
    file.seek(0)
    digest = _digest(file, length)
    file.seek(length)
    file.write(b"\n#sha256:" + digest + b"\n")


def _sealed_length(file: BinaryIO, size: int) -> int:
    """Bytes of the file without its seal, which is checked; `size` where it has none."""
    length = max(size - SEAL_LENGTH, 0)
    file.seek(length)
    found = SEAL.fullmatch(file.read(SEAL_LENGTH))
    file.seek(0)
    if not found:
        return size
    if _digest(file, length) != found[1]:
        raise Fault("its checksum is not that of its content")
    file.seek(0)
    return length


def _digest(file: BinaryIO, length: int) -> bytes:
    digest = hashlib.sha256()
    for begin in range(0, length, BLOCK):
        digest.update(file.read(min(BLOCK, length - begin)))
    return digest.hexdigest().encode()


# -- torch's zip ----------------------------------------------------------------------------------


def _read_zip(file: BinaryIO, size: int) -> Any:
    with _zip_faults(), zipfile.ZipFile(file) as archive:
        entries = _checked_entries(archive, size)
        pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise Fault("it is a zip without torch's data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in entries:
            raise Fault("it is a TorchScript archive; save the model's state_dict()")
        order = entries.get(f"{root}byteorder")
        if order and _bytes(archive, order) != b"little":
            raise Fault("its numbers are big-endian; save it on a little-endian machine")
        storages: dict[str, Storage] = {}

        def storage(identity: Any) -> Storage:
            found = _storage(identity)
            known = storages.setdefault(found.key, found)
            if known.tensor is None and known.dtype is not None:
                entry = entries.get(f"{root}data/{found.key}")
                if entry is None:
                    raise Fault(f"it lacks the storage {found.key}")
                known.tensor = _tensor(archive, entry, found)
            if (known.dtype, known.count) != (found.dtype, found.count):
                raise Fault(f"it gives two sizes of the storage {found.key}")
            return known

        data = _bytes(archive, entries[pickles[0]])
        content = Interpreter(BoundedFile(io.BytesIO(data), len(data)), storage).load()
        used = {f"{root}data/{s.key}" for s in storages.values() if s.tensor is not None}
        for name, entry in entries.items():  # whose checksums nothing has checked yet
            if name not in used and name != pickles[0]:
                _pour(archive, entry, lambda block: None)
    return _Builder(size).build(content)


@contextlib.contextmanager
def _zip_faults():
    """What zipfile says of a damaged file, in our words."""
    try:
        yield
    except zipfile.BadZipFile as error:
        found = re.match(r"Bad CRC-32 for file '([^']{1,80})'", str(error))
        why = f"the checksum of {found[1]} is wrong" if found else "its zip is not whole"
        raise Fault(f"{why}: copy or download it again") from error


def _checked_entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise Fault("its zip has two entries of one name")
    if sum(entry.file_size for entry in entries.values()) > INFLATION * size:
        raise Fault(f"its zip inflates to more than {INFLATION} times its size")
    if any(e.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
           for e in entries.values()):  # fmt: skip
        raise Fault("its zip is compressed in a way that torch does not know")
    return entries


def _pour(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, take: Callable[[bytes], Any]) -> None:
    """Read an entry to its end, where zipfile compares the checksums."""
    length = 0
    with archive.open(entry) as stream:
        while block := stream.read(BLOCK):
            take(block)
            length += len(block)
    if length != entry.file_size:
        raise Fault(f"its entry {entry.filename[:80]} is cut off")


def _bytes(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    blocks: list[bytes] = []
    _pour(archive, entry, blocks.append)
    return b"".join(blocks)


def _tensor(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, storage: Storage) -> Tensor:
    if entry.file_size != storage.count * storage.dtype.itemsize:
        raise Fault(f"its storage {storage.key} has {entry.file_size} bytes, not those it needs")
    values = torch.empty(entry.file_size, dtype=torch.uint8)
    buffer, filled = memoryview(values.numpy()), 0

    def take(block: bytes) -> None:
        nonlocal filled
        buffer[filled : filled + len(block)] = block
        filled += len(block)

    _pour(archive, entry, take)
    return values.view(storage.dtype)


def _storage(identity: Any) -> Storage:
    """From a persistent id: "storage", its type, key, device, number of values."""
    if type(identity) is not tuple or len(identity) < 5 or identity[0] != "storage":
        raise Fault("it refers to an object that is no storage of torch")
    _, kind, key, _, count, *_ = identity
    if not (isinstance(kind, Reference) and isinstance(key, str) and _is_count(count)):
        raise Fault("it refers to a storage of torch in an unknown way")
    return Storage(STORAGES.get(kind.name), key, count)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


# -- torch's older format -------------------------------------------------------------------------


class _LegacyInterpreter(Interpreter):
    """Also of torch's files before 1.6: five pickles, then the bytes of the storages.

    The pickles: a magic number, a protocol, the system, the content, the keys of the storages.
    """

    def __init__(self, source: BoundedFile):
        super().__init__(source)
        self.storages: dict[str, Storage] = {}

    def load_torch(self) -> Any:
        self.load()  # the protocol
        system = self.load()
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise Fault("its numbers are big-endian; save it on a little-endian machine")
        self.persistent = self._known_storage
        content = self.load()
        self.persistent = None
        keys = self.load()
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(self.storages):
            raise Fault("its storages are not those that it refers to")
        for key in keys:
            self._fill(self.storages[key])
        return content

    def _known_storage(self, identity: Any) -> Storage:
        found = _storage(identity)
        if len(identity) > 5 and identity[5] is not None:
            raise Fault("its storages are parts of others, as torch 0.3 wrote them")
        if found.dtype is None:
            raise Fault(f"its storage {found.key} is of a kind that no weight has")
        known = self.storages.setdefault(found.key, found)
        if (known.dtype, known.count) != (found.dtype, found.count):
            raise Fault(f"it gives two sizes of the storage {found.key}")
        return known

    def _fill(self, storage: Storage) -> None:
        if int.from_bytes(self.source.read(8), "little") != storage.count:
            raise Fault(f"its storage {storage.key} has another size than it says")
        data = self.source.read(storage.count * storage.dtype.itemsize)
        values = torch.empty(len(data), dtype=torch.uint8)
        memoryview(values.numpy())[:] = data
        storage.tensor = values.view(storage.dtype)


# -- arrays from what was noted of them -----------------------------------------------------------


class _Builder:
    """Replaces the interpreter's stand-ins by arrays, once they are known to be whole.

    Args:
        size: of the file in bytes, which bounds what its arrays may hold together.
    """

    def __init__(self, size: int):
        self.left = INFLATION * size
        self.built: dict[int, tuple[Any, int]] = {}  # id -> (value, how many values it holds)

    def build(self, content: Any) -> Any:
        return self._build(content, "", 0)[0]

    def _build(self, value: Any, name: str, depth: int) -> tuple[Any, int]:
        if value is None or isinstance(value, bool | int | float | str | bytes | bytearray | set):
            return value, 1
        if id(value) not in self.built:
            if depth > MAX_DEPTH:
                raise Fault(f"its containers are nested more than {MAX_DEPTH} deep")
            made, count = self._make(value, name, depth)
            if count > MAX_VALUES:
                raise Fault(f"it refers to its values more than {MAX_VALUES:,} times")
            self.built[id(value)] = made, count
        return self.built[id(value)]

    def _make(self, value: Any, name: str, depth: int) -> tuple[Any, int]:
        if isinstance(value, dict):
            items = {
                key: self._build(item, f"{name}.{key}" if name else str(key), depth + 1)
                for key, item in value.items()
            }
            kind = Counter if isinstance(value, Counter) else dict
            made = kind({key: item for key, (item, _) in items.items()})
            return made, 1 + sum(count for _, count in items.values())
        if isinstance(value, list | tuple):
            parts = [self._build(v, f"{name}[{i}]", depth + 1) for i, v in enumerate(value)]
            return type(value)(item for item, _ in parts), 1 + sum(count for _, count in parts)
        name = reprlib.repr(name)[1:-1] if len(name) > 120 else name
        if isinstance(value, NumpyArray):
            return self._numpy_array(value, name), 1
        if isinstance(value, TensorView):
            return self._tensor(value, name), 1
        if isinstance(value, OddTensor):
            raise Fault(f"{name} is a {value.kind}; save it as a plain float32 tensor")
        if isinstance(value, Reference) and value.call in (None, Opaque):
            return value.name, 1  # such as a dtype of torch
        raise Fault(f"{name} is neither a plain value nor an array")

    def _numpy_array(self, value: NumpyArray, name: str) -> Any:
        letters = getattr(value.dtype, "letters", None)
        if letters is None or letters not in NUMPY_LETTERS:
            code = reprlib.repr(getattr(value.dtype, "code", None))
            big = code[1:2] == ">" and code[2:-1] in NUMPY_LETTERS
            if not (big and code.endswith("1'")):
                of = "big-endian numbers" if big else f"dtype {code}"
                raise Fault(f"{name} is an array of {of}; save it as little-endian float32")
            letters = code[2:-1]
        dtype = np.dtype(letters)
        shape = _checked_shape(value.shape, name)
        data = value.data.encode("latin1") if isinstance(value.data, str) else value.data
        needed = math.prod(shape) * dtype.itemsize
        if not isinstance(data, bytes | bytearray) or len(data) != needed:
            has = f"{len(data)} bytes" if isinstance(data, bytes | bytearray) else "no bytes"
            raise Fault(f"{name} has {has}, not the {needed} of its shape and dtype")
        self._spend(needed, name)
        if needed == 0:
            return np.empty(shape, dtype)
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if value.fortran else "C")
        return array[()] if not shape else array

    def _tensor(self, value: TensorView, name: str) -> Tensor:
        storage = value.storage
        if not isinstance(storage, Storage) or storage.tensor is None:
            raise Fault(f"{name} is a tensor of an unknown kind; save it as a float32 tensor")
        shape, stride = _checked_shape(value.shape, name), _checked_shape(value.stride, name)
        if len(shape) != len(stride) or not _is_count(value.offset):
            raise Fault(f"{name} is a tensor whose strides do not fit its shape")
        count = math.prod(shape)
        last = value.offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if count and last >= storage.count:
            raise Fault(f"{name} is larger than the numbers that the file has for it")
        self._spend(count * storage.dtype.itemsize, name)
        return storage.tensor.as_strided(shape, stride, value.offset if count else 0)

    def _spend(self, size: int, name: str) -> None:
        """Of many arrays over the same bytes, no more are made than would fit the memory."""
        self.left -= size
        if self.left < 0:
            raise Fault(f"its arrays, up to {name}, are larger together than the file")


def _checked_shape(shape: Any, name: str) -> tuple[int, ...]:
    if not isinstance(shape, tuple | list) or len(shape) > 32 or not all(map(_is_count, shape)):
        raise Fault(f"{name} has a shape that is not one of whole numbers from 0")
    return tuple(shape)
