"""Detectors' runs: what metrics.json tells after kills, other settings; checkpoints by name, and
their conversion, done once."""

import json
import math
from pathlib import Path

import pytest
import torch

from moco_det.benchmark.jobs.grid import Experiment, Run
from moco_det.benchmark.jobs.runs import (
    RunFolder,
    Settings,
    convert,
    identity,
    named_checkpoints,
    weight_file,
)
from moco_det.common import weight_sources
from moco_det.common.errors import UserError
from moco_det.common.files import file_hash
from moco_det.common.resnets import Architecture
from moco_det.common.weight_sources import read_state_dict

EXPERIMENT = Experiment("voc", "A detector", iterations=100, batch=16, trials=5)


def make(tmp_path, trial=1, options=(), config="configs/voc_moco.yaml"):
    return RunFolder(Run(EXPERIMENT, "moco", trial, Path(config), tuple(options)), tmp_path)


def write_metrics(folder, *lines):
    folder.path.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder.path / "metrics.json").write_text(text)


def trained(iteration, loss):
    return {"iteration": iteration, "lr": 0.1, "total_loss": loss}


def test_a_resumed_run_repeats_lines(tmp_path):
    folder = make(tmp_path)
    lines = [
        trained(19, 5.0),
        trained(39, 4.0),
        trained(59, 3.0),
        trained(39, 4.5),
        trained(59, 3.5),
    ]
    write_metrics(folder, *lines)
    assert folder.losses() == [(20, 5.0), (40, 4.5), (60, 3.5)]
    assert folder.iteration() == 60


def test_results_are_the_last_evaluation_s(tmp_path):
    folder = make(tmp_path)
    assert folder.results() == {}
    write_metrics(
        folder,
        trained(19, 5.0),
        {"iteration": 19, "bbox/AP": 1.0},
        trained(39, 4.0),
        {"iteration": 40, "bbox/AP": 2.0, "segm/AP": 3.0, "bbox/AP-cat": None},
    )
    assert folder.results() == {"bbox/AP": 2.0, "segm/AP": 3.0}


def test_a_line_that_a_kill_has_cut_off_is_dropped(tmp_path):
    folder = make(tmp_path)
    write_metrics(folder, trained(19, 5.0))
    path = folder.path / "metrics.json"
    path.write_text(path.read_text() + '{"iteration": 39, "lr": 0.')
    assert folder.losses() == [(20, 5.0)]
    folder.repair()
    with path.open("a") as file:
        file.write(json.dumps(trained(39, 4.0)) + "\n")
    assert folder.losses() == [(20, 5.0), (40, 4.0)]


def test_a_run_of_other_settings_is_refused(tmp_path):
    def check(folder, engine):
        Settings(tmp_path, engine).job(folder.run).check_identity()

    folder = make(tmp_path, options=["SOLVER.MAX_ITER", "10"])
    folder.write_record({"state": "finished", "identity": identity(folder.run, "native")})
    check(folder, "native")
    with pytest.raises(UserError, match=r"options was \{'SOLVER.MAX_ITER': '10'\}, is \{\}"):
        check(make(tmp_path), "native")
    with pytest.raises(UserError, match="engine was native, is detectron2"):
        check(folder, "detectron2")


def test_weights_are_known_by_their_content(tmp_path):
    one, two = tmp_path / "one.pkl", tmp_path / "two.pkl"
    one.write_bytes(b"a")
    two.write_bytes(b"a")
    same = [
        identity(make(tmp_path, options=["MODEL.WEIGHTS", str(path)]).run, "native")
        for path in (one, two)
    ]
    assert same[0] == same[1]
    # sha256 of "a"
    assert same[0]["weights"].startswith("sha256:ca978112ca1bbdcafac231b39a23dc4d")
    two.write_bytes(b"b")
    other = make(tmp_path, options=["MODEL.WEIGHTS", str(two)])
    assert identity(other.run, "native") != same[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """torchvision's layout, a quarter as wide."""
    path = tmp_path_factory.mktemp("torchvision") / "r50.pth"
    torch.save(Architecture(50, 1, 16, 0.25).build().state_dict(), path)
    return path


def test_a_bare_file_is_held_against_moco_in1m(tmp_path):
    one, two = tmp_path / "one.pth", tmp_path / "two.pth"
    one.touch()
    two.touch()
    assert named_checkpoints([str(one)]) == {"moco_in1m": one}
    assert named_checkpoints([f"a={one}", f"b-2={two}"]) == {"a": one, "b-2": two}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{}", "{}"], "two checkpoints for the row moco_in1m"),
        (["random={}"], "cannot name a row"),
        (["a/b={}"], "cannot name a row"),
        (["x={}.missing"], "is not a file"),
    ],
)
def test_refusals(tmp_path, words, reason):
    (tmp_path / "c.pth").touch()
    with pytest.raises(UserError, match=reason):
        named_checkpoints([word.format(tmp_path / "c.pth") for word in words])


def test_conversion_is_done_once_for_one_checkpoint_and_again_where_it_is_gone(
    checkpoint, tmp_path, capfd
):
    weights = weight_file("mine", checkpoint, tmp_path)
    assert weights == tmp_path / "weights/mine.pkl"
    convert({"mine": checkpoint}, tmp_path)
    names = read_state_dict(weights)[0]
    assert names["stem.conv1.weight"].shape == (16, 3, 7, 7)
    assert weight_file("mine", weights, tmp_path / "elsewhere") == weights  # Detectron2's already
    written = weights.stat().st_mtime_ns
    convert({"mine": checkpoint}, tmp_path)
    assert weights.stat().st_mtime_ns == written
    other = tmp_path / "other.pth"
    other.write_bytes(checkpoint.read_bytes() + b" ")
    with pytest.raises(UserError, match="which was another checkpoint"):
        convert({"mine": other}, tmp_path)
    weights.unlink()
    convert({"mine": checkpoint}, tmp_path)
    assert weights.is_file()


def test_a_file_that_cannot_be_converted_is_named(tmp_path):
    path = tmp_path / "bad.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="bad.pth"):
        convert({"mine": path}, tmp_path)


def test_a_conversion_of_the_first_version_is_not_repeated(checkpoint, tmp_path, capfd):
    """It kept the source and its hash in weights/ROW.json."""
    weights = weight_file("mine", checkpoint, tmp_path)
    weights.parent.mkdir()
    weights.write_bytes(b"converted")
    note = {"hash": file_hash(checkpoint), "source": str(checkpoint)}
    weights.with_suffix(".json").write_text(json.dumps(note))
    convert({"mine": checkpoint}, tmp_path)
    assert weights.read_bytes() == b"converted"
    note["hash"] = "sha256:0"
    weights.with_suffix(".json").write_text(json.dumps(note))
    with pytest.raises(UserError, match="which was another checkpoint"):
        convert({"mine": checkpoint}, tmp_path)


# -- damaged folders ------------------------------------------------------------------------------


def finished(tmp_path):
    folder = make(tmp_path)
    write_metrics(folder, trained(19, 5.0), {"iteration": 20, "bbox/AP": 1.0})
    (folder.path / "config.yaml").write_text("SOLVER: {MAX_ITER: 20, IMS_PER_BATCH: 2}\n")
    folder.write_record({"state": "finished"})
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", b"", "holds no evaluation"),
        ("metrics.json", bytes(200), "holds no evaluation"),  # a last line without its end
        ("metrics.json", b"\xb8\n", "line 1 is no JSON of an object"),
        ("metrics.json", b'{"iteration": 3}\n\0\0\n', "line 2 is no JSON"),
        ("metrics.json", b'{"iteration": "3", "lr": 1}\n', "line 1: iteration is '3'"),
        ("metrics.json", b'{"lr": 1}\n', "line 1: iteration is None"),
        ("metrics.json", b'{"iteration": 3, "bbox/AP": "x"}\n', "line 1: bbox/AP is 'x'"),
        ("metrics.json", b'{"iteration": 3, "total_loss": [1]}\n', r"total_loss is \[1\]"),
        ("config.yaml", b"", "lacks SOLVER.MAX_ITER"),
        ("config.yaml", bytes(100), "not valid YAML"),
        ("config.yaml", b"SOLVER: [1]\n", "lacks SOLVER.MAX_ITER"),
        ("config.yaml", b"SOLVER: {MAX_ITER: x, IMS_PER_BATCH: 2}\n", "lacks SOLVER.MAX_ITER"),
        ("config.yaml", b"SOLVER: {MAX_ITER: 1", "not valid YAML"),
    ],
)
def test_a_finished_run_whose_files_are_damaged_is_unreadable(tmp_path, name, content, message):
    folder = finished(tmp_path)
    assert folder.look().state == "finished"
    (folder.path / name).write_bytes(content)
    found = folder.look()
    assert found.state == "unreadable"
    with pytest.raises(UserError, match=message):
        raise UserError(found.problem)
    assert str(folder.path) in found.problem and len(found.problem) <= 300


def test_a_file_that_is_gone_makes_a_finished_run_unreadable(tmp_path):
    folder = finished(tmp_path)
    (folder.path / "config.yaml").unlink()
    assert "cannot read config" in folder.look().problem
    folder = finished(tmp_path)
    (folder.path / "metrics.json").unlink()
    (folder.path / "metrics.json").mkdir()
    assert "no regular file" in folder.look().problem


def test_numbers_that_are_none_are_passed_over(tmp_path):
    """Detectron2 writes NaN for a class that the test set lacks, and for a loss that diverges."""
    folder = make(tmp_path)
    write_metrics(
        folder, trained(19, float("nan")), {"iteration": 20, "bbox/AP": 1.0, "bbox/AP-x": math.nan}
    )
    assert folder.results() == {"bbox/AP": 1.0}
    assert folder.losses() == [] and folder.iteration() == 20


def test_addresses_and_official_names_are_rows(tmp_path, monkeypatch):
    """As files; for a plan alone nothing is downloaded."""
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path / "hub"))
    downloaded = []

    def download(url, path, progress):
        downloaded.append(url)
        torch.save({"state_dict": {"a": torch.ones(1)}}, path)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    monkeypatch.setattr(weight_sources, "_check_digest", lambda *place: None)
    words = ["dense=https://a.org/densecl.pth?download=true", "moco=moco_v2_200ep"]
    planned = named_checkpoints(words, download=False)
    assert list(planned) == ["dense", "moco"]
    assert not any(path.is_file() for path in planned.values())
    assert weight_file("moco", planned["moco"], tmp_path) == tmp_path / "weights/moco.pkl"
    assert downloaded == []
    files = named_checkpoints(words)
    assert all(path.is_file() for path in files.values())
    assert len(downloaded) == 2
    assert named_checkpoints(words, download=False) == files
    assert list(named_checkpoints(["https://a.org/densecl.pth?a=b"])) == ["moco_in1m"]
