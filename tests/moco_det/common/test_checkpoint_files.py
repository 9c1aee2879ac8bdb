"""The one reader of checkpoints: what it reads, and that all else is refused in one line."""

import collections
import io
import os
import pickle
import random
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from moco_det.common.checkpoint_files import UnreadableFile, read_checkpoint, seal
from tests.fuzz import pickles

SHAPE = (64, 3)
CONTENT = {
    "epoch": 3,
    "state_dict": {"w": torch.randn(SHAPE), "n": torch.tensor(5), "half": torch.ones(4).half()},
    "rng": [{"python": random.Random(0).getstate(), "bytes": torch.arange(8, dtype=torch.uint8)}],
    "words": ["a", 1.5, None, True, b"raw", -(2**40), (1, (2, 3))],
}


def write(path, content, **options):
    torch.save(content, path, **options)
    return path


def message(path) -> str:
    with pytest.raises(UnreadableFile) as refused:
        read_checkpoint(path)
    text = str(refused.value)
    assert path.name in text
    assert "\n" not in text
    assert len(text.replace(str(path), "a")) <= 300
    return text


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("zipped", [True, False])
def test_it_reads_what_torch_reads(tmp_path, zipped):
    path = write(tmp_path / "a.pth", CONTENT, _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize("zipped", [True, False])
def test_views_and_containers_of_torch(tmp_path, zipped):
    base = torch.arange(24.0)
    layer = torch.nn.BatchNorm1d(2)
    content = {
        "transposed": base.view(4, 6).t(),
        "part": base[5:9],
        "parameter": torch.nn.Parameter(base[:2].clone()),
        "state": layer.state_dict(),  # an OrderedDict with an attribute
        "size": base.view(4, 6).size(),
        "milestones": collections.Counter([3, 5, 5]),
        "dtype": torch.float16,
        "expanded": torch.ones(1).expand(3),
    }
    path = write(tmp_path / "a.pth", content, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    for name in ("transposed", "part", "parameter", "expanded"):
        assert torch.equal(found[name], content[name].detach()), name
    assert torch.equal(found["state"]["running_var"], torch.ones(2))
    assert found["size"] == (4, 6)
    assert found["milestones"] == {3: 1, 5: 2}
    assert found["dtype"] == "torch.float16"
    assert found["part"].untyped_storage().data_ptr() == (
        found["transposed"].untyped_storage().data_ptr()
    )


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_numpy_in_every_protocol(tmp_path, protocol):
    arrays = {
        f"{dtype}{order}": np.arange(6).reshape(2, 3).astype(dtype, order=order)
        for dtype in ("f2", "f4", "f8", "i8", "u1", "?")
        for order in "CF"
    }
    arrays |= {"scalar": np.float32(2.5), "none": np.empty((0, 3), "f4")}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays, protocol))
    found = read_checkpoint(tmp_path / "a.pkl")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


@pytest.mark.parametrize("name", pickles.attacks(SHAPE))
def test_no_attack_leads_to_an_array_or_to_memory(tmp_path, name):
    data = pickles.with_fragment({}, "w", pickles.attacks(SHAPE)[name])
    (tmp_path / "a.pkl").write_bytes(data)
    tracemalloc.start()
    try:
        if name in ("not finite", "infinite", "integers", "booleans", "None", "a list",
                    "memo of gigabytes"):  # fmt: skip
            read_checkpoint(tmp_path / "a.pkl")  # whole; `checked_weights` judges them
        else:
            message(tmp_path / "a.pkl")
        assert tracemalloc.get_traced_memory()[1] < 50e6 + 3 * len(data)
    finally:
        tracemalloc.stop()


def test_no_payload_is_obeyed(tmp_path):
    for name, fragment in pickles.payloads(tmp_path / "canary").items():
        (tmp_path / "a.pkl").write_bytes(pickles.with_fragment({}, "w", fragment))
        message(tmp_path / "a.pkl")
        assert not (tmp_path / "canary").exists(), name


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("w is a sparse tensor", lambda w: w.to_sparse()),
        ("w is a quantized tensor", lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
        ("w is a meta tensor", lambda w: w.to("meta")),
        ("w is a tensor of torch.float8_e5m2", lambda w: w.to(torch.float8_e5m2)),
        ("larger together than the file", lambda w: torch.ones(1).expand(1 << 33)),
    ],
)
def test_odd_tensors_are_named(tmp_path, kind, make):
    path = write(tmp_path / "a.pth", {"state_dict": {"w": make(torch.ones(4))}})
    assert kind in message(path)


@pytest.mark.parametrize("big", [np.float32, np.int64])
def test_big_endian_numbers_are_named(tmp_path, big):
    array = np.ones(3, np.dtype(big).newbyteorder(">"))
    for protocol in (2, 5):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"w": array}}, protocol))
        assert "model.w is an array of big-endian numbers" in message(tmp_path / "a.pkl")


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    """Some bytes of a zip are padding, or say again what another place says."""
    path = write(tmp_path / "a.pth", CONTENT)
    whole, expected = path.read_bytes(), read_checkpoint(path)
    rng, refused = random.Random(0), 0
    for _ in range(400):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            found = read_checkpoint(path)
        except UnreadableFile:
            refused += 1
        else:
            assert_same(found, expected)
    assert refused > 100


def test_the_checksum_of_a_zip_is_that_of_its_numbers(tmp_path):
    path = write(tmp_path / "a.pth", {"w": torch.arange(1000.0)})
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(500.0, 510.0).numpy().tobytes())] ^= 0x40
    path.write_bytes(data)
    assert "the checksum of a/data/0 is wrong" in message(path)


def test_a_sealed_pickle_notices_every_flipped_bit(tmp_path):
    path = tmp_path / "a.pkl"
    with open(path, "w+b") as file:
        pickle.dump({"model": {"w": np.arange(50.0, dtype="f4")}}, file, protocol=4)
        seal(file)
    whole = path.read_bytes()
    assert read_checkpoint(path)["model"]["w"][49] == 49
    assert pickle.loads(whole)["model"]["w"][49] == 49  # as Detectron2 reads it
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        message(path)


def test_a_zip_that_inflates_is_refused_before_it_does(tmp_path):
    path = tmp_path / "a.pth"
    source = zipfile.ZipFile(write(tmp_path / "b.pth", {"w": torch.zeros(1000)}))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            big = name.endswith("data/0")
            target.writestr(name, bytes(1 << 27) if big else source.read(name))
    tracemalloc.start()
    assert "inflates to more than 3 times its size" in message(path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_a_zip_that_is_compressed_in_earnest_is_read(tmp_path):
    source = zipfile.ZipFile(write(tmp_path / "b.pth", CONTENT))
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert_same(read_checkpoint(tmp_path / "a.pth"), CONTENT)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "empty").touch()
    for name in ("fifo", "folder", "zero", "itself", "empty", "absent"):
        message(tmp_path / name)


def test_a_torchscript_archive_says_what_to_do(tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "a.pth")
    assert "TorchScript" in message(tmp_path / "a.pth")


def test_containers_that_refer_to_each_other_many_times(tmp_path):
    """A list of ten times a list of ten times ...: 10^60 values in a few hundred bytes."""
    tree = [0]
    for _ in range(60):
        tree = [tree] * 10
    write(tmp_path / "a.pth", {"config": tree})
    assert "refers to its values" in message(tmp_path / "a.pth")


def test_a_list_called_over_and_over_makes_no_gigabytes(tmp_path):
    ordered, many = pickles.reference("collections.OrderedDict"), io.BytesIO()
    many.write(b"\x80\x02](" + b"".join(pickles.plain((i, i)) for i in range(20000)) + b"eq\x000")
    many.write((ordered + b"h\x00\x85R") * 5000 + b".")
    (tmp_path / "a.pkl").write_bytes(many.getvalue())
    assert "more bytes than the file has" in message(tmp_path / "a.pkl")


@pytest.mark.parametrize("key", [(1, 2), frozenset({1})])
def test_keys_are_names(tmp_path, key):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": {key: 1}}, 2))
    message(tmp_path / "a.pkl")
