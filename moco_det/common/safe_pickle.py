"""Pickles of arrays and plain containers, run without NumPy's, torch's or pickle's own code.

A pickle is a program. This is an interpreter of it that knows data only: a name that a file asks
for (`numpy.ndarray`, `torch._utils._rebuild_tensor_v2`) is looked up in a table of stand-ins, which
note what an array would be made of. Nothing of the file's choosing is imported, called or allocated
here; `moco_det.common.checkpoint_files` makes the arrays, once it has compared the notes with the
bytes that there are.

Python's own unpickler, restricted by `find_class`, would not do: a memo index of 2^31 makes it
allocate gigabytes, and BUILD on a `numpy.dtype` makes NumPy follow pointers out of the file.
"""

import codecs
import pickletools
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from moco_det.common.pickled_arrays import (
    CALLS,
    MENTIONED,
    OPAQUE,
    DType,
    Fault,
    NumpyArray,
    Opaque,
    Reference,
    UnsafeName,
    checked_key,
)

MAX_OPCODES = 1_000_000  # an array takes about twenty
MAX_BITS = 128  # of an integer; torch's magic number has 77
MAX_COPIED = 1 << 26  # bytes that calls may make of a file smaller than that


@dataclass
class BoundedFile:
    """A file up to the byte `end`; longer reads than it holds fail before they allocate."""

    file: BinaryIO
    end: int
    tell: Callable[[], int] = field(init=False)

    def __post_init__(self):
        self.tell = self.file.tell

    def read(self, count: int) -> bytes:
        if count > self.end - self.tell():
            raise Fault("it ends too soon")
        return self.file.read(count)

    def readline(self) -> bytes:
        return self.file.readline(self.end - self.tell())


class Interpreter:
    """Runs one pickle after the other of a file.

    Args:
        source: the file, which each pickle leaves where it ends.
        persistent: makes the object of a persistent id; torch gives its storages by these.

    Raises (from `load`):
        Fault: the pickle asks for more than data, or is none. A damaged one raises nearly any
            exception besides; none of them comes from code that the file chose.
    """

    def __init__(self, source: BoundedFile, persistent: Callable[[Any], Any] | None = None):
        self.source = source
        self.persistent = persistent
        self.copied = 0  # bytes that calls, rather than the file's own bytes, have made

    def load(self) -> Any:
        """Plain containers and values, and the stand-ins above. Memory is bounded by the file."""
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        for _ in range(MAX_OPCODES):
            name, argument = self._next_opcode()
            if name == "STOP":
                return self.stack.pop()
            if name in _PUSHED:
                if isinstance(argument, int) and argument.bit_length() > MAX_BITS:
                    raise Fault("it holds an integer of thousands of digits")
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name not in ("PROTO", "FRAME"):
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise Fault(f"it uses {name} of pickle, which no file of arrays needs")
                step(argument)
        raise Fault(f"it has more than {MAX_OPCODES:,} instructions, which no file of arrays needs")

    def _next_opcode(self) -> tuple[str, Any]:
        code = self.source.read(1)
        opcode = pickletools.code2op.get(code.decode("latin-1"))
        if opcode is None:
            raise Fault("it is no pickle")
        if opcode.name == "STRING":  # Python 2's, of any bytes
            text = pickletools.read_stringnl(self.source, decode=False)
            return opcode.name, codecs.escape_decode(text)[0].decode("latin-1")
        return opcode.name, opcode.arg.reader(self.source) if opcode.arg else None

    def _copies(self, size: int) -> None:
        """A small file must not make large objects by making one of them over and over."""
        self.copied += size
        if self.copied > max(self.source.end, MAX_COPIED):
            raise Fault("its pickle makes more bytes than the file has")

    # What lies on the stack.

    def _mark(self, argument: None) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _popped(self) -> list[Any]:
        """What lies above the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _pop(self, argument: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._popped()

    def _pop_mark(self, argument: None) -> None:
        self._popped()

    def _dup(self, argument: None) -> None:
        self.stack.append(self.stack[-1])

    def _memoize(self, argument: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _binput = _long_binput = _put
    _binget = _long_binget = _get

    # Containers.

    def _tuple(self, argument: None) -> None:
        self._pushed_tuple(self._popped())

    def _tuple1(self, argument: None) -> None:
        self._pushed_tuple([self.stack.pop()])

    def _tuple2(self, argument: None) -> None:
        self._pushed_tuple([self.stack.pop() for _ in range(2)][::-1])

    def _tuple3(self, argument: None) -> None:
        self._pushed_tuple([self.stack.pop() for _ in range(3)][::-1])

    def _pushed_tuple(self, items: list[Any]) -> None:
        self.stack.append(tuple(items))

    def _list(self, argument: None) -> None:
        items = self._popped()
        self.stack.append(items)

    def _dict(self, argument: None) -> None:
        items = self._popped()
        self.stack.append({})
        self._set(items)

    def _append(self, argument: None) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, argument: None) -> None:
        self._extend(self._popped())

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], Opaque):
            return
        if not isinstance(self.stack[-1], list):
            raise Fault("its pickle appends to what is no list")
        self.stack[-1].extend(items)

    def _setitem(self, argument: None) -> None:
        self._set([self.stack.pop() for _ in range(2)][::-1])

    def _setitems(self, argument: None) -> None:
        self._set(self._popped())

    def _set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise Fault("its pickle sets an item of what is no dict")
        self.stack[-1].update(zip(map(checked_key, items[::2]), items[1::2], strict=True))

    def _additems(self, argument: None) -> None:
        items = self._popped()
        if not isinstance(self.stack[-1], set):
            raise Fault("its pickle adds to what is no set")
        self.stack[-1].update(map(checked_key, items))

    # Names, calls and states.

    def _global(self, names: str) -> None:
        self._look_up(*names.split(" ", 1))

    def _stack_global(self, argument: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._look_up(str(module), str(name))

    def _look_up(self, module: str, name: str) -> None:
        wanted = f"{module}.{name}"
        own = {
            "_codecs.encode": self._encode,
            "builtins.bytearray": self._bytearray,
            "builtins.bytes": self._bytearray,  # how old protocols write empty ones
        }
        call = CALLS.get(wanted) or own.get(wanted.replace("__builtin__", "builtins"))
        if module.partition(".")[0] in OPAQUE:
            call = Opaque
        if call is None and wanted not in MENTIONED:
            shown = reprlib.repr(wanted)[1:-1]
            raise UnsafeName(f"it asks for {shown}, which does not belong in a file of arrays")
        self.stack.append(Reference(wanted, call))

    def _encode(self, text: str, encoding: str = "latin1") -> bytes:
        """`_codecs.encode`, by which old pickle protocols write bytes."""
        self._copies(len(text))
        return text.encode("latin1")

    def _bytearray(self, data: Any = b"", encoding: str = "latin1") -> bytes:
        if isinstance(data, str):
            return self._encode(data)
        if not isinstance(data, bytes | bytearray):
            raise Fault("its pickle makes bytes without giving them")
        return data

    def _reduce(self, argument: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not (isinstance(function, Reference) and function.call and type(arguments) is tuple):
            raise Fault("its pickle calls what is no function")
        self._copies(sum(64 * len(a) for a in arguments if isinstance(a, list | tuple | dict)))
        self.stack.append(function.call(*arguments))

    def _newobj(self, argument: None) -> None:
        """By which objects of a class are made, rather than arrays."""
        opaque = isinstance(self.stack[-2], Reference) and self.stack[-2].call is Opaque
        if not opaque or self.stack[-1] != ():
            raise Fault("it holds objects, which no file of arrays needs")
        self._reduce(argument)

    def _build(self, argument: None) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Opaque):
            if isinstance(state, dict):
                target.update(state)
        elif isinstance(target, NumpyArray):
            shape, dtype, fortran, data = state[-4:]
            target.shape, target.dtype, target.fortran, target.data = shape, dtype, fortran, data
        elif isinstance(target, DType):
            self._set_byte_order(target, state)
        elif not isinstance(target, dict):  # attributes of an OrderedDict are torch's versions
            raise Fault("its pickle sets the state of what has none")

    @staticmethod
    def _set_byte_order(dtype: DType, state: Any) -> None:
        """Version, byte order, no subarray, no fields, no own item size, no flags."""
        if type(state) is not tuple or state[2:] not in ((None, None, None, -1, -1, 0),
                                                         (None, None, None, -1, -1)):  # fmt: skip
            raise Fault("a dtype of NumPy is not one of plain numbers")
        if state[1] not in ("<", ">", "|", "="):
            raise Fault("a dtype of NumPy has an unknown byte order")
        dtype.code = state[1] + dtype.letters

    def _binpersid(self, argument: None) -> None:
        if self.persistent is None:
            raise Fault("it refers to objects outside itself")
        self.stack.append(self.persistent(self.stack.pop()))


_PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
