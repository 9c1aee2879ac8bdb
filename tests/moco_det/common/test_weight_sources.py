"""Where weights come from, and what is read of a file or refused."""

import argparse
import hashlib
import http.server
import multiprocessing
import os
import pickle
import struct
import sys
import threading
import urllib.error
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from weight_arrays import ARRAYS, FILE, assert_equal

from moco_det.common.errors import UserError
from moco_det.common.weight_sources import (
    OFFICIAL,
    is_remote,
    kept_file,
    local_file,
    read_state_dict,
)
from moco_det.weights.files import write_weights


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


def test_what_lies_beside_the_arrays_of_others_is_no_obstacle(tmp_path):
    """Flags, paths and objects of a training framework; nothing is imported for them."""
    options = argparse.Namespace(lr=0.1, output=Path("output"), tags=["a"])
    torch.save({"state_dict": dict(ARRAYS), "args": options}, tmp_path / "w.pth")
    weights, metadata = read_state_dict(tmp_path / "w.pth")
    assert_equal(weights)
    assert metadata["args"] == {"lr": 0.1, "output": {}, "tags": ["a"]}
    # What a file of mmengine's holds: an object of a class that is not here.
    made = b"cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81}X\x01\x00\x00\x00aK\x05sb"
    entries = b"X\x05\x00\x00\x00model}X\x01\x00\x00\x00aG?\xf0\x00\x00\x00\x00\x00\x00s"
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02}(" + entries + b"X\x01\x00\x00\x00m" + made + b"u.")
    with pytest.raises(UserError, match="a is a float, not an array"):
        read_state_dict(tmp_path / "w.pkl")
    assert "mmengine" not in sys.modules


def test_labels_of_a_queue_are_no_weights(tmp_path):
    """solo-learn's NNCLR keeps them beside its backbone."""
    encoder = torchvision.models.resnet18().state_dict()
    state = {f"backbone.{name}": value for name, value in encoder.items() if name[:3] != "fc."}
    torch.save({"state_dict": state | {"queue_y": -torch.ones(4).long()}}, tmp_path / "w.ckpt")
    weights, _ = read_state_dict(tmp_path / "w.ckpt")
    assert weights["queue_y"].tolist() == [-1] * 4
    state["backbone.conv1.weight"] = state["backbone.conv1.weight"].long()
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match="backbone.conv1.weight holds values of type int64"):
        read_state_dict(tmp_path / "w.ckpt")


# -- safetensors ----------------------------------------------------------------------------------


@pytest.fixture
def safetensors_file(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(ARRAYS | {"half": torch.ones(2).half()}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_safetensors_by_its_content(safetensors_file):
    path = safetensors_file.rename(safetensors_file.with_name("pytorch_model.bin"))
    weights, metadata = read_state_dict(path)
    assert_equal({k: weights[k] for k in ARRAYS})
    assert weights["half"].dtype == torch.float32
    assert metadata == {}


def header_of(**tensors) -> bytes:
    text = repr(tensors).replace("'", '"').replace("(", "[").replace(")", "]").encode()
    return struct.pack("<Q", len(text)) + text


def tensor(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        header_of(a=tensor(end=1 << 40)) + bytes(8),  # more than the file has
        header_of(a=tensor(shape=(1 << 40,))) + bytes(8),
        header_of(a=tensor(), b=tensor()) + bytes(8),  # the same bytes twice
        header_of(a=tensor()) + bytes(7),  # cut off
        header_of(a=tensor()) + bytes(9),
        header_of(a=tensor(dtype="F33")) + bytes(8),
        struct.pack("<Q", 9) + b"{" * 9,
        header_of(a=tensor("F32", (1,), 0, 4)) + struct.pack("<f", float("nan")),
        header_of(a=tensor("F8_E4M3", (8,))) + bytes(8),
        header_of(),
    ],
)
def test_a_bad_safetensors_file_is_one_line(tmp_path, data):
    pytest.importorskip("safetensors")
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"w\.safetensors") as refused:
        read_state_dict(tmp_path / "w.safetensors")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_without_the_library_its_extra_is_named(safetensors_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"needs safetensors: pip install 'moco_det\[hub\]'"):
        read_state_dict(safetensors_file)


# -- addresses ------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """Where torch.hub keeps its downloads."""
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path):
    """(address, folder that it serves, paths that it was asked for)."""
    asked, folder = [], tmp_path / "served"

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *rest):
            pass

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

    folder.mkdir()
    handler = partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder, asked
        httpd.shutdown()


def test_an_address_is_downloaded_once(server, hub_folder):
    """Two files of one name are two files."""
    address, folder, asked = server
    for name, value in (("a", 1.0), ("b", 2.0)):
        write_weights(folder / name / "resnet50.pth", {"model": {"x": torch.full((2,), value)}})
    for _ in range(2):
        assert_equal(read_state_dict(f"{address}/a/resnet50.pth")[0], {"x": torch.ones(2)})
        assert_equal(read_state_dict(f"{address}/b/resnet50.pth")[0], {"x": 2 * torch.ones(2)})
    assert asked == ["/a/resnet50.pth", "/b/resnet50.pth"]
    assert {path.name for path in hub_folder.rglob("*") if path.is_file()} == {
        "resnet50.pth",
        ".resnet50.pth.lock",
    }


def test_a_hash_in_the_name_is_checked(server, hub_folder):
    address, folder, asked = server
    write_weights(folder / "w.pth", FILE)
    data = (folder / "w.pth").read_bytes()
    right = f"w-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    (folder / right).write_bytes(data)
    assert local_file(f"{address}/{right}") == hub_folder / right  # as torch.hub would keep it
    (folder / "w-0123abcd.pth").write_bytes(data)
    with pytest.raises(UserError, match=r"has the SHA256 .*, not 0123abcd: .* it was not kept"):
        local_file(f"{address}/w-0123abcd.pth")
    assert not (hub_folder / "w-0123abcd.pth").exists()
    for no_hash in ("w-20230818.pth", "R-50.pth"):
        (folder / no_hash).write_bytes(data)
        assert local_file(f"{address}/{no_hash}").read_bytes() == data


def test_no_such_file_and_no_network(server, hub_folder):
    address, _, _ = server
    url = f"{address}/a/w.pth"
    with pytest.raises(UserError, match=r"cannot download .* \(HTTP Error 404.*fetch") as refused:
        read_state_dict(url)
    place = hub_folder / address.removeprefix("http://").replace(":", "_") / "a/w.pth"
    assert f"fetch {url} by other means and put it at {place}, or name" in str(refused.value)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_weights(place, FILE)
    assert_equal(read_state_dict(url)[0])  # which is heeded
    with pytest.raises(UserError, match=r"cannot download http://127\.0\.0\.1:9/w\.pth \("):
        read_state_dict("http://127.0.0.1:9/w.pth")
    with pytest.raises(UserError, match="names no file"):
        read_state_dict(f"{address}/")


def fetch_in_process(url, folder, barrier, found):
    torch.hub.set_dir(folder)
    barrier.wait()
    found.put(str(local_file(url)))


def test_of_several_processes_one_downloads(server, hub_folder):
    address, folder, asked = server
    write_weights(folder / "w.pth", FILE)
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(3), context.Queue()
    arguments = (f"{address}/w.pth", str(hub_folder.parent), barrier, found)
    processes = [context.Process(target=fetch_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    paths = {found.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert asked == ["/w.pth"]
    assert len(paths) == 1


@pytest.fixture
def downloads(monkeypatch):
    """Stands in for the network: addresses that were asked for; each gives FILE."""
    asked = []

    def download(url, path, progress):
        asked.append(url)
        torch.save(FILE, path)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    return asked


def test_model_zoo_address(hub_folder, downloads):
    assert_equal(read_state_dict("detectron2://ImageNetPretrained/MSRA/R-50.pkl")[0])
    folder = "https://dl.fbaipublicfiles.com/detectron2/"
    assert downloads == [folder + "ImageNetPretrained/MSRA/R-50.pkl"]


def test_failed_download_says_what_to_do(hub_folder, monkeypatch):
    def fail(url, path, progress):
        Path(path).write_bytes(b"half")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(UserError, match=r"cannot download detectron2://x\.pkl \(.*no network.*\)"):
        read_state_dict("detectron2://x.pkl")
    assert [p.suffix for p in hub_folder.rglob("*") if p.is_file()] == [".lock"]


@pytest.mark.parametrize(
    ("source", "url"),
    [
        ("torchvision://resnet50", "resnet50-0676ba61.pth"),
        ("torchvision://resnet50/IMAGENET1K_V2", "resnet50-11ad3fa6.pth"),
        ("torchvision://wide_resnet50_2", "wide_resnet50_2-95faca4d.pth"),
    ],
)
def test_torchvisions_weights(hub_folder, downloads, source, url):
    hub_folder.mkdir(parents=True)
    torch.save(FILE, hub_folder / url)  # as torchvision has left it there
    assert_equal(read_state_dict(source)[0])
    assert downloads == []
    (hub_folder / url).unlink()
    with pytest.raises(UserError, match="has the SHA256"):
        read_state_dict(source)
    assert downloads == [f"https://download.pytorch.org/models/{url}"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision://resnet51", "torchvision has no such network"),
        ("torchvision://resnet50/V3", "torchvision has IMAGENET1K_V1, IMAGENET1K_V2"),
        ("hf://a/b", "write hf://ORGANISATION/REPOSITORY/FILE"),
        (
            "ftp://a/b.pth",
            "no weight file at ftp://a/b.pth; addresses begin with http://, https://",
        ),
        ("moco_v3_300ep", "no weight file at moco_v3_300ep"),
    ],
)
def test_what_is_no_source(hub_folder, source, message):
    if source.startswith("hf://"):
        pytest.importorskip("huggingface_hub")
    with pytest.raises(UserError, match=message):
        read_state_dict(source)


def test_official_weights_say_what_to_expect_and_are_checked(
    hub_folder, downloads, monkeypatch, capsys
):
    """Also where they were put by hand: a download may have been cut off."""
    official = OFFICIAL["moco_v2_200ep"]
    assert official.url.endswith("/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar")
    with pytest.raises(UserError, match=r"has the MD5 \w{8}\.\.\., not 59fd9945: .*not kept"):
        read_state_dict("moco_v2_200ep")
    assert downloads == [official.url]
    expected = "67.7 % top-1 (linear, ImageNet) and AP50 82.4, AP 57.0, AP75 63.6"
    assert expected in capsys.readouterr().out
    path = hub_folder / "moco_v2_200ep_pretrain.pth.tar"
    torch.save(FILE, path)
    with pytest.raises(UserError, match=rf"remove {path}"):
        read_state_dict("moco_v2_200ep")
    digest = hashlib.md5(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(OFFICIAL, "moco_v2_200ep", official._replace(md5=digest))
    assert_equal(read_state_dict("moco_v2_200ep")[0])


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_remote("moco_v1_200ep")
    write_weights(tmp_path / "w.pth", FILE)
    (tmp_path / "w.pth").rename("moco_v1_200ep")
    assert not is_remote("moco_v1_200ep")
    assert_equal(read_state_dict("moco_v1_200ep")[0])


def test_what_is_kept_is_known_without_a_download(tmp_path, hub_folder, downloads):
    write_weights(tmp_path / "w.pth", FILE)
    assert kept_file(tmp_path / "w.pth") == tmp_path / "w.pth"
    assert kept_file("https://a.org/b/w.pth") is None
    assert kept_file("moco_v1_200ep") is None
    assert downloads == []
    assert local_file("https://a.org/b/w.pth") == kept_file("https://a.org/b/w.pth")
    assert len(downloads) == 1


def test_the_hub_of_hugging_face(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    write_weights(tmp_path / "w.pth", FILE)
    asked = []

    def download(**options):
        asked.append(options)
        return str(tmp_path / "w.pth")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert_equal(read_state_dict("hf://timm/resnet50.tv_in1k/model.safetensors")[0])
    assert_equal(read_state_dict("hf://a/b@v1.0/folder/w.pth")[0])
    assert asked == [
        {"repo_id": "timm/resnet50.tv_in1k", "filename": "model.safetensors", "revision": None},
        {"repo_id": "a/b", "filename": "folder/w.pth", "revision": "v1.0"},
    ]

    def fail(**options):
        raise OSError("no network\nsecond line")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda **options: None)
    assert kept_file("hf://a/b/w.pth") is None
    message = (
        r"cannot download hf://a/b/w\.pth \(no network second line\): "
        r"fetch https://huggingface\.co/a/b/resolve/main/w\.pth by other means"
    )
    with pytest.raises(UserError, match=message):
        read_state_dict("hf://a/b/w.pth")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs huggingface_hub: pip install 'moco_det\[hub\]'"):
        read_state_dict("hf://a/b/w.pth")
