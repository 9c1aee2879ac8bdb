"""The interpreter of pickles alone; `test_checkpoint_files` has what becomes of its notes."""

import io
import pickle
import struct
import tracemalloc

import pytest

from moco_det.common import safe_pickle
from moco_det.common.pickled_arrays import Fault, NumpyArray, TensorView, UnsafeName
from moco_det.common.safe_pickle import BoundedFile, Interpreter
from tests.fuzz.pickles import build, call, dictionary, dtype, pack, plain, reference

PLAIN = {"a": [1, -2.5, "b", None, True], "c": (1, (2,), ()), "d": {"e": b"f"}, "g": {1, "h"}}


def interpret(data: bytes, persistent=None):
    return Interpreter(BoundedFile(io.BytesIO(data), len(data)), persistent).load()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol(protocol):
    shared = [1]
    content = PLAIN | {"twice": [shared, shared]}
    found = interpret(pickle.dumps(content, protocol))
    assert found == content
    assert found["twice"][0] is found["twice"][1]


def test_several_pickles_of_one_file():
    file = io.BytesIO(pickle.dumps(1) + pickle.dumps([2]) + b"rest")
    interpreter = Interpreter(BoundedFile(file, len(file.getvalue())))
    assert (interpreter.load(), interpreter.load(), file.read()) == (1, [2], b"rest")


def test_arrays_are_noted_and_not_made():
    made = call("numpy.ndarray", plain((2, 3)), plain("<f4"), plain("x" * 24))
    array = interpret(made + b".")
    assert isinstance(array, NumpyArray)
    assert (array.shape, array.dtype.letters, len(array.data)) == ((2, 3), "f4", 24)
    view = call("torch._utils._rebuild_tensor_v2", plain("s"), plain(0), plain((2,)), plain((1,)))
    view = interpret(view + b".")
    assert isinstance(view, TensorView)
    assert (view.storage, view.shape) == ("s", (2,))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (reference("os.system") + b".", "it asks for os.system"),
        (b"\x80\x04" + plain("numpy") + plain("linalg.os.system") + b"\x93.", "linalg.os.system"),
        (call("builtins.bytearray", plain(1 << 33)) + b".", "makes bytes without giving them"),
        (b"X" + struct.pack("<I", 0xFFFFFFF0) + b".", "it ends too soon"),
        (b"\x8e" + struct.pack("<Q", 1 << 62) + b".", "it ends too soon"),
        (b"\x82\x01.", "it uses EXT1 of pickle"),
        (b"(ios\nsystem\n.", "it uses INST of pickle"),
        (plain(1) + b"Q.", "it refers to objects outside itself"),
        (plain(1) + pack() + b"R.", "calls what is no function"),
        (reference("torch.FloatStorage") + pack() + b"R.", "calls what is no function"),
        (build(plain([]), plain({})) + b".", "sets the state of what has none"),
        (build(dtype("O8"), plain((3, "|", None, None, None, -1, -1, 63))) + b".", "plain numbers"),
        (b"}" + pack(plain(1)) + plain(2) + b"s.", "a key that is a tuple"),
        (plain(1 << 200) + b".", "an integer of thousands of digits"),
        (b"N0" * 600 + b".", "more than 1,000 instructions"),
        (b"\xff", "it is no pickle"),
    ],
)
def test_what_is_no_data_is_refused(data, message, monkeypatch):
    monkeypatch.setattr(safe_pickle, "MAX_OPCODES", 1000)
    tracemalloc.start()
    with pytest.raises(Fault, match=message):
        interpret(data)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_memo_index_takes_no_memory():
    assert interpret(b"Nr\xf0\xff\xff\x7fj\xf0\xff\xff\x7f.") is None


def test_objects_of_known_packages_are_their_attributes():
    """Of flags and configs beside the arrays; the class is not imported, nor called."""
    made = reference("omegaconf.dictconfig.DictConfig") + pack() + b"\x81"
    found = interpret(build(made, dictionary({"lr": plain(0.1)})) + b".")
    assert found == {"lr": 0.1}
    assert interpret(call("pathlib.PosixPath", plain("/"), plain("etc")) + b".") == {}
    assert interpret(dictionary({"type": reference("builtins.dict")}) + b".")["type"].call is None


@pytest.mark.parametrize(
    "data",
    [
        reference("pathlib.Path") + pack(plain("/etc")) + b"\x81",
        reference("collections.OrderedDict") + pack() + b"\x81",
        reference("numpy.dtype") + pack() + b"\x81",
    ],
)
def test_objects_that_are_made_of_something_are_refused(data):
    with pytest.raises(Fault, match="it holds objects"):
        interpret(data + b".")


def test_unsafe_names_are_a_kind_of_their_own():
    with pytest.raises(UnsafeName):
        interpret(dictionary({"a": reference("os.system")}) + b".")
