"""Checkpoints by name, and their conversion, done once."""

import pytest
import torch

from moco_det.benchmark.jobs.checkpoints import convert, named_checkpoints, weight_file
from moco_det.common.errors import UserError
from moco_det.weights.files import read_state_dict
from moco_det.weights.names import Architecture


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


def test_conversion_is_done_once_and_for_one_checkpoint(checkpoint, repository, tmp_path, capfd):
    weights = weight_file("mine", checkpoint, tmp_path)
    assert weights == tmp_path / "weights/mine.pkl"
    convert({"mine": checkpoint}, tmp_path, repository)
    names = read_state_dict(weights)[0]
    assert names["stem.conv1.weight"].shape == (16, 3, 7, 7)
    assert weight_file("mine", weights, tmp_path / "elsewhere") == weights  # Detectron2's already
    written = weights.stat().st_mtime_ns
    convert({"mine": checkpoint}, tmp_path, repository)
    assert weights.stat().st_mtime_ns == written
    other = tmp_path / "other.pth"
    other.write_bytes(checkpoint.read_bytes() + b" ")
    with pytest.raises(UserError, match="which was another checkpoint"):
        convert({"mine": other}, tmp_path, repository)


def test_a_file_that_cannot_be_converted_is_named(tmp_path, repository):
    path = tmp_path / "bad.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="bad.pth"):
        convert({"mine": path}, tmp_path, repository)
