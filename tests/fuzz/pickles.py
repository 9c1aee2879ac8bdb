"""Hostile pickles: written by hand, and by changing the opcodes of good ones."""

import pickle
import pickletools
import random
import struct
from pathlib import Path

import numpy as np

# -- fragments, each leaves one object on the unpickler's stack -----------------------------------


def plain(value) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def reference(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def pack(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(function: bytes | str, *items: bytes) -> bytes:
    function = reference(function) if isinstance(function, str) else function
    return function + pack(*items) + b"R"


def build(fragment: bytes, state: bytes) -> bytes:
    return fragment + state + b"b"


def dictionary(items: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(plain(name) + value for name, value in items.items()) + b"u"


def dtype(code: str, state: tuple | None = None) -> bytes:
    made = call("numpy.dtype", plain(code), plain(0), plain(1))
    return build(made, plain(state)) if state else made


FORGED = dtype("O8", (3, "|", None, None, None, -1, -1, 0))  # objects, said to be none


def attacks(shape: tuple[int, ...]) -> dict[str, bytes]:
    """Fragments that stand for an array of `shape` and must not become one."""
    size = int(np.prod(shape)) * 4
    array, rebuilt = "numpy.ndarray", "numpy.core.multiarray._reconstruct"
    raw = plain(bytearray(size)) if size < 1 << 20 else call("builtins.bytearray", plain(size))
    pointers = plain(bytearray(b"A" * 2 * size))
    empty = call(rebuilt, reference(array), plain((0,)), plain("b"))
    strides = (0,) * len(shape)

    def state(of: tuple, kind: bytes, content: bytes) -> bytes:
        return build(empty, pack(plain(1), plain(of), kind, plain(False), content))

    return {
        "forged dtype": call("numpy.core.multiarray.scalar", FORGED, plain("AAAAAAAA")),
        "forged dtype in an array": call(array, plain(shape), FORGED, pointers),
        "pointers in a buffer": call("numpy.core.numeric._frombuffer", pointers, FORGED,
                                     plain(shape), plain("C")),
        "negative offset": call(array, plain(shape), plain("f4"), raw, plain(-4096)),
        "offset": call(array, plain((1,)), plain("f4"), raw, plain(size - 4)),
        "uninitialised": call(array, plain(shape), plain("f4")),
        "strides of 0": call(array, plain(shape), plain("f4"), raw, plain(0), plain(strides)),
        "gigabytes by strides": call(array, plain((1 << 33,)), plain("u1"), plain(bytearray(1)),
                                     plain(0), plain((0,))),
        "gigabytes": call(array, plain((1 << 31,)), plain("f4")),
        "gigabytes of bytearray": call("builtins.bytearray", plain(1 << 33)),
        "overflowing shape": call(array, plain((1 << 32, 1 << 32)), plain("f4"), raw),
        "negative shape": call(array, plain((-1, *shape)), plain("f4"), raw),
        "objects": call(array, plain(shape), plain("O")),
        "strings": call(array, plain(shape), plain("S4"), raw),
        "times": call(array, plain(shape), plain("M8[s]"), plain(bytearray(2 * size))),
        "void": call(array, plain(shape), plain("V4"), raw),
        "complex": call(array, plain(shape), plain("c8"), plain(bytearray(2 * size))),
        "short buffer": call(array, plain(shape), plain("f4"), plain(bytearray(4))),
        "short state": state(shape, dtype("f4"), plain("AAAA")),
        "state of objects": state(shape, dtype("O8"), plain([None] * 4)),
        "state of forged objects": state((8,), FORGED, plain("A" * 64)),
        "forged itemsize": call(array, plain((4,)),
                                dtype("V8", (3, "|", None, ("a",), {"a": (1, 2)}, 8, 1, 0)), raw),
        "dtype of gigabytes": call(array, plain((1,)), plain(f"V{(1 << 31) - 1}")),
        "an ndarray for a base": build(call(rebuilt, reference("numpy.dtype"), plain((0,)),
                                            plain("b")), plain(())),
        "long integer": b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20),
        "a string said to be long": b"X" + struct.pack("<I", 0xFFFFFFF0),
        "bytes said to be long": b"\x8e" + struct.pack("<Q", 1 << 40),
        "deep": b"]" * 50000 + b"a" * 49999,
        "deep tuples": b")" + b"\x85" * 100000,
        "itself": b"]q\x00h\x00a",
        "memo of gigabytes": b"Nr\xf0\xff\xff\x7f",
        "persistent id": plain("x") + b"Q",
        "extension": b"\x82\x01",
        "not finite": plain(np.full(shape, np.nan, "f4")),
        "infinite": plain(np.full(shape, np.inf, "f4")),
        "integers": plain(np.ones(shape, "i4")),
        "booleans": plain(np.ones(shape, "?")),
        "None": plain(None),
        "a list": plain([1.0]),
    }  # fmt: skip


def payloads(canary: Path) -> dict[str, bytes]:
    """Fragments that write the canary where they are obeyed."""
    code = f"open({str(canary)!r}, 'w')"
    return {
        "os.system": call("os.system", plain(f"touch {canary}")),
        "posix.system": call("posix.system", plain(f"touch {canary}")),
        "eval": call("builtins.eval", plain(code)),
        "Python 2's eval": call("__builtin__.eval", plain(code)),
        "open": call("builtins.open", plain(str(canary)), plain("w")),
        "memmap": call("numpy.memmap", plain(str(canary)), plain("u1"), plain("w+"), plain(0),
                       plain((8,))),
        "instance": b"(" + plain(f"touch {canary}") + b"ios\nsystem\n",
        "object": b"(" + reference("os.system") + plain(f"touch {canary}") + b"o",
        "new object": reference("pathlib.Path") + pack(plain(str(canary))) + b"\x81",
        "getattr": call(call("builtins.getattr", reference("os"), plain("system")), plain("x")),
        "dotted": b"\x80\x04" + plain("numpy") + plain("lib.npyio.DataSource") + b"\x93",
        "runstring": call("numpy.testing._private.utils.runstring", plain(code), plain({})),
    }  # fmt: skip


def with_fragment(arrays: dict[str, np.ndarray], name: str, fragment: bytes) -> bytes:
    """A file of weights in which one array is given by `fragment`."""
    weights = {key: plain(array) for key, array in arrays.items()} | {name: fragment}
    entries = {"model": dictionary(weights), "__author__": plain("fuzz")}
    return b"\x80\x02" + dictionary(entries | {"matching_heuristics": plain(True)}) + b"."


# -- opcodes --------------------------------------------------------------------------------------

_INTEGERS = (0, 1, -1, 7, 255, 65535, 2**31 - 1, -(2**31))
_GLOBALS = (
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "collections.OrderedDict",
    "numpy.core.multiarray._reconstruct", "builtins.bytearray", "_codecs.encode", "os.getcwd",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.FloatStorage",
    "torch.LongStorage", "torch.Size", "torch.serialization._get_layout", "torch.float8_e5m2",
    "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_meta_tensor_no_storage", "torch.device",
)  # fmt: skip
_LETTERS = (b"0", b"1", b"2", b"N", b"\x88", b"K\x00", b")", b"]", b"}", b"R", b"b", b"a", b"u",
            b"s", b"t", b"(", b"\x85", b"\x86", b"\x87", b"\x81", b"\x92", b"h\x00", b"Q", b".",
            b"\x90", b"\x91", b"\x94", b"\x97", b"\x98")  # fmt: skip


def mutate_opcodes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A pickle of which up to three opcodes are dropped, repeated, exchanged or replaced."""
    starts = [(opcode.name, position) for opcode, _, position in pickletools.genops(data)]
    ends = [position for _, position in starts[1:]] + [len(data)]
    parts = [data[begin:end] for (_, begin), end in zip(starts, ends, strict=True)]
    for index, (name, _) in enumerate(starts):
        if name == "FRAME":  # whose length would be wrong, so that nothing else would be met
            parts[index] = b""
    whole = b"".join(parts)
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        index = rng.randrange(1, len(parts))
        kind = rng.choice(("drop", "repeat", "exchange", "letter", "integer", "global"))
        if kind in ("integer", "global"):  # at a place where there is one
            wanted = ("INT", "LONG") if kind == "integer" else ("GLOBAL", "BININT")
            places = [i for i, (name, _) in enumerate(starts) if any(w in name for w in wanted)]
            index = rng.choice(places) if places else index
        done.append(f"{kind} {index}")
        if kind == "drop":
            parts[index] = b""
        elif kind == "repeat":
            parts[index] *= rng.choice((2, 3, 1000))
        elif kind == "exchange":
            other = rng.randrange(1, len(parts))
            parts[index], parts[other] = parts[other], parts[index]
        elif kind == "letter":
            parts[index] = rng.choice(_LETTERS)
        elif kind == "integer":
            parts[index] = b"J" + struct.pack("<i", rng.choice(_INTEGERS))
        else:
            parts[index] = reference(rng.choice(_GLOBALS))
    changed = b"".join(parts)
    return mutate_opcodes(rng, data) if changed == whole else (changed, ", ".join(done))
