"""segment_retrieval.py as a command."""

import json
import sys

import pytest
import torch
from PIL import Image
from tiny_voc_segments import write_tiny_segments

from moco_det.common.errors import UserError
from pretrain.flags.dense import parse_segment_retrieval
from pretrain.segment_retrieval import retrieve

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_segments(tmp_path_factory.mktemp("voc"))


def flags(data, *more):
    encoder = ["--pretrained", "random", "-a", "resnet18w0.25x", "-j", "1"]
    return [str(data), *encoder, "--image-size", "48", "--segments", "4", *map(str, more)]


def test_numbers_and_sheet_are_written(data, tmp_path, capsys):
    output, sheet = tmp_path / "o.json", tmp_path / "sheet.png"
    retrieve(parse_segment_retrieval(flags(data, "--output", output, "--sheet", sheet)), CPU)
    written = json.loads(output.read_text())
    assert written.keys() == {"retrieval_miou_7", "retrieval_miou_21"}
    assert f"over 21 {written['retrieval_miou_21']:.2f}" in capsys.readouterr().out
    with Image.open(sheet) as image:
        assert image.height == 2 * (160 + 18)


def test_bad_input_is_told_before_the_work(data, tmp_path, monkeypatch):
    for more, message in (
        (["--segments", 0], "--segments must be at least 1"),
        (["--train-split", "a/b"], "it is the name of a list"),
        (["--train-split", "train_aug"], "no list .*train_aug.txt"),
        (["--sheet", "x.jpg"], "the sheet is a .png"),
    ):
        with pytest.raises(UserError, match=message):
            retrieve(parse_segment_retrieval(flags(data, *more)), CPU)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UserError, match=r"needs the package scikit-learn: .*'\.\[evaluation\]'"):
        retrieve(parse_segment_retrieval(flags(data)), CPU)
