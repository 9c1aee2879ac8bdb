"""Weight files: what is read, what is refused, and what a failed write leaves behind."""

import os
import pickle
import pickletools

import numpy as np
import pytest
import torch
from weight_arrays import ARRAYS, FILE, METADATA, assert_equal

from moco_det.common.errors import UserError
from moco_det.common.weight_sources import read_state_dict
from moco_det.weights.files import write_weights


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


def test_a_flipped_bit_in_what_we_wrote_is_noticed(tmp_path):
    write_weights(tmp_path / "w.pkl", FILE)
    data = bytearray((tmp_path / "w.pkl").read_bytes())
    data[data.index(np.arange(6, dtype="f4").tobytes()) + 9] ^= 0x40
    assert pickle.loads(data)["model"]  # which a pickle does not show by itself
    (tmp_path / "w.pkl").write_bytes(data)
    with pytest.raises(UserError, match="its checksum is not that of its content"):
        read_state_dict(tmp_path / "w.pkl")


def test_bfloat16_is_written_as_float32_without_loss(tmp_path):
    """NumPy has no bfloat16, and float16 neither its range nor all of its small numbers."""
    values = torch.tensor([1e30, -3e-20, 1.0], dtype=torch.bfloat16)
    write_weights(tmp_path / "w.pkl", {"model": {"a": values}})
    found = read_state_dict(tmp_path / "w.pkl")[0]["a"]
    assert found.dtype == torch.float32
    assert torch.equal(found, values.float())


def test_a_worker_that_is_killed_meanwhile_is_no_full_disk(tmp_path, monkeypatch):
    def killed(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        write_weights(tmp_path / "model.pth", {"model": {}})
    assert list(tmp_path.iterdir()) == []
