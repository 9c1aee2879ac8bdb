"""Weight files: what is read, what is refused, and what a failed write leaves behind."""

import os
import pickle
import pickletools
import struct

import numpy as np
import pytest
import torch

from moco_det.common.errors import UserError
from moco_det.common.weight_sources import read_state_dict
from moco_det.weights.files import write_weights

ARRAYS = {
    "stem.conv1.weight": torch.arange(6.0).reshape(2, 3),
    "stem.conv1.norm.num_batches_tracked": torch.tensor(7),  # no dimensions
}
METADATA = {"__author__": "MOCO", "matching_heuristics": True, "requires": {"A.B": [1]}}
FILE = {"model": ARRAYS} | METADATA


def assert_equal(weights, expected=ARRAYS):
    assert list(weights) == list(expected)
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype
        assert torch.equal(weights[name], value)


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pth.tar"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / "deep" / f"weights{suffix}"
    write_weights(path, FILE)
    weights, metadata = read_state_dict(path)
    assert_equal(weights)
    assert metadata == METADATA
    assert os.listdir(path.parent) == [path.name]


def test_pickle_is_what_detectron2_unpickles(tmp_path):
    write_weights(tmp_path / "w.pkl", FILE)
    with open(tmp_path / "w.pkl", "rb") as file:
        content = pickle.load(file, encoding="latin1")
    assert content["__author__"] == "MOCO"
    assert content["matching_heuristics"] is True
    for name, value in ARRAYS.items():
        array = content["model"][name]
        assert isinstance(array, np.ndarray)
        assert array.flags.writeable  # torch.from_numpy warns of others
        np.testing.assert_array_equal(array, value.numpy())


def test_pickle_names_nothing_that_moved_in_numpy_2(tmp_path):
    """Files that name `numpy._core` cannot be read with NumPy before 1.26."""
    write_weights(tmp_path / "w.pkl", FILE)
    operations = list(pickletools.genops((tmp_path / "w.pkl").read_bytes()))
    strings = {argument for _, argument, _ in operations if isinstance(argument, str)}
    assert "ndarray" in strings
    assert not any("core" in string for string in strings)


def test_bfloat16_becomes_float32_in_a_pickle(tmp_path):
    write_weights(tmp_path / "w.pkl", {"model": {"a": torch.ones(2, dtype=torch.bfloat16)}})
    assert_equal(read_state_dict(tmp_path / "w.pkl")[0], {"a": torch.ones(2)})


@pytest.mark.parametrize("protocol", [1, 2, 4, 5])
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_numpys_own_pickles_of_either_version(tmp_path, protocol, core):
    data = pickle.dumps({"model": {k: v.numpy() for k, v in ARRAYS.items()}}, protocol=protocol)
    if protocol <= 2:  # later ones give the length of the name
        data = data.replace(b"numpy._core", core)
    (tmp_path / "w.pkl").write_bytes(data)
    assert_equal(read_state_dict(tmp_path / "w.pkl")[0])


def test_caffe2_file_pickled_by_python_2(tmp_path):
    """Byte for byte what Python 2 wrote: 8-bit strings that hold the floats."""
    values = (-1.5, 3.25)
    floats = struct.pack("<2f", *values)
    assert max(floats) > 127  # which is why ASCII, the default encoding, cannot read it
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
        b"(I1\n(I2\ntcnumpy\ndtype\n(U\x02f4I0\nI1\ntR(I3\nU\x01<NNNI-1\nI-1\nI0\ntbI00\n"
        b"U\x08" + floats + b"tb"
    )
    names = (b"res_conv1_bn_s", b"res_conv1_bn_s_momentum", b"fc1000_b")
    items = b"".join(b"U" + bytes([len(name)]) + name + array + b"s" for name in names)
    (tmp_path / "R-50.pkl").write_bytes(b"\x80\x02}U\x05blobs}" + items + b"s.")
    weights, metadata = read_state_dict(tmp_path / "R-50.pkl")
    expected = torch.tensor(values)
    assert_equal(weights, {"stem.conv1.norm.weight": expected, "fc1000_b": expected})
    assert metadata["__author__"] == "Caffe2"


def test_bare_dict_and_moco_layout(tmp_path):
    torch.save(dict(ARRAYS), tmp_path / "bare.pth")
    torch.save({"arch": "resnet18", "state_dict": dict(ARRAYS)}, tmp_path / "moco.pth.tar")
    assert read_state_dict(tmp_path / "bare.pth")[1] == {}
    weights, metadata = read_state_dict(tmp_path / "moco.pth.tar")
    assert_equal(weights)
    assert metadata == {"arch": "resnet18"}


def test_file_written_by_old_torch(tmp_path):
    torch.save({"model": ARRAYS}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert_equal(read_state_dict(tmp_path / "w.pth")[0])


class RunsCommand:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Evaluates:
    def __reduce__(self):
        return eval, ("1 + 1",)


def test_malicious_pickle_is_refused_and_not_run(tmp_path):
    proof = tmp_path / "was_run"
    for protocol in range(6):
        with open(tmp_path / "w.pkl", "wb") as file:
            pickle.dump({"model": {"a": RunsCommand(proof)}}, file, protocol=protocol)
        with pytest.raises(
            UserError, match=r"w\.pkl cannot be read safely: it asks for \w+\.system"
        ):
            read_state_dict(tmp_path / "w.pkl")
        assert not proof.exists()
    with open(tmp_path / "w.pkl", "wb") as file:
        pickle.dump({"a": Evaluates()}, file)
    with pytest.raises(UserError, match="it asks for builtins.eval"):
        read_state_dict(tmp_path / "w.pkl")


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_torch_file_is_refused_and_not_run(tmp_path, zipped):
    proof = tmp_path / "was_run"
    content = {"state_dict": {"a": RunsCommand(proof)}}
    torch.save(content, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"w\.pth\.tar cannot be read safely: .*\w+\.system"):
        read_state_dict(tmp_path / "w.pth.tar")
    assert not proof.exists()


def test_a_safe_name_cannot_be_walked_to_an_unsafe_one(tmp_path):
    """Protocol 4 lets a name hold dots, which `find_class` would follow from the module."""
    data = b"\x80\x04\x8c\x05numpy\x8c\x10linalg.os.system\x93\x8c\x04true\x85R."
    (tmp_path / "w.pkl").write_bytes(data)
    with pytest.raises(UserError, match="it asks for numpy.linalg.os.system"):
        read_state_dict(tmp_path / "w.pkl")


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_file(tmp_path, suffix, damage):
    path = tmp_path / f"w{suffix}"
    write_weights(path, FILE)
    data = path.read_bytes()
    path.write_bytes(
        {"truncated": data[: len(data) // 2], "garbage": b"hello", "empty": b""}[damage]
    )
    with pytest.raises(UserError, match=rf"w\{suffix} (is damaged|cannot be read safely)"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "holds no arrays"),
        ({"model": {"a": "text"}}, "a is a str, not an array"),
    ],
)
def test_other_content(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        read_state_dict(tmp_path / "w.pth")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no weight file at .*nothing.pkl"):
        read_state_dict(tmp_path / "nothing.pkl")


def test_model_zoo_address(tmp_path, monkeypatch):
    asked = []
    write_weights(tmp_path / "R-50.pkl", FILE)

    def download(self, path, **options):
        asked.append(path)
        return str(tmp_path / "R-50.pkl")

    monkeypatch.setattr("iopath.common.file_io.HTTPURLHandler._get_local_path", download)
    assert_equal(read_state_dict("detectron2://ImageNetPretrained/MSRA/R-50.pkl")[0])
    folder = "https://dl.fbaipublicfiles.com/detectron2/"
    assert asked == [folder + "ImageNetPretrained/MSRA/R-50.pkl"]


def test_failed_download_says_what_to_do(monkeypatch):
    def fail(self, path, **options):
        raise OSError("no network")

    monkeypatch.setattr("iopath.common.file_io.HTTPURLHandler._get_local_path", fail)
    with pytest.raises(UserError, match=r"cannot download detectron2://x\.pkl \(no network\)"):
        read_state_dict("detectron2://x.pkl")


def test_failed_check_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "w.pkl"
    write_weights(path, FILE)
    before = path.read_bytes()

    def refuse(written):
        assert_equal(read_state_dict(written)[0], {"b": torch.ones(1)})
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        write_weights(path, {"model": {"b": torch.ones(1)}}, check=refuse)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.pkl"]


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def fail(content, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed")

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(UserError, match="cannot write .*w.pth"):
        write_weights(tmp_path / "w.pth", FILE)
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_weights(tmp_path / "file" / "w.pkl", FILE)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.weight", torch.tensor([float("nan")]), "is not finite"),
        ("a.running_var", torch.tensor([-1.0]), "is a variance"),
        ("a.weight", torch.ones(3, dtype=torch.int32), "type int32"),
        ("a.weight", torch.ones(3, dtype=torch.bool), "type bool"),
    ],
)
def test_what_is_no_weight_is_named(tmp_path, suffix, name, value, message):
    write_weights(tmp_path / f"w{suffix}", {"model": {name: value}})
    with pytest.raises(UserError, match=rf"w\{suffix}: {name} .*{message}"):
        read_state_dict(tmp_path / f"w{suffix}")


def test_a_flipped_bit_in_what_we_wrote_is_noticed(tmp_path):
    write_weights(tmp_path / "w.pkl", FILE)
    data = bytearray((tmp_path / "w.pkl").read_bytes())
    data[data.index(np.arange(6, dtype="f4").tobytes()) + 9] ^= 0x40
    assert pickle.loads(data)["model"]  # which a pickle does not show by itself
    (tmp_path / "w.pkl").write_bytes(data)
    with pytest.raises(UserError, match="its checksum is not that of its content"):
        read_state_dict(tmp_path / "w.pkl")
