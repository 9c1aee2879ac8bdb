"""davis.py as a command."""

import json
import re

import numpy as np
import pytest
import torch
from commands import run_as_torchrun
from PIL import Image
from tiny_davis import write_tiny_davis

from moco_det.common.errors import UserError
from pretrain.davis import follow
from pretrain.flags.dense import parse_davis

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_davis(tmp_path_factory.mktemp("davis"), frames=3)


def flags(data, *more):
    encoder = ["--pretrained", "random", "-a", "resnet18w0.25x", "-j", "1"]
    return [str(data), *encoder, *map(str, more)]


def test_numbers_masks_and_sheet_are_written(data, tmp_path, capsys):
    output, masks, sheet = (tmp_path / name for name in ("o.json", "masks", "sheet.png"))
    argv = flags(data, "--output", output, "--masks", masks, "--sheet", sheet)
    follow(parse_davis(argv), CPU)
    written = json.loads(output.read_text())
    assert written.keys() == {"davis_j_mean", "davis_f_mean", "davis_jf_mean"}
    assert all(0 < value <= 100 for value in written.values())
    first, *_, last = capsys.readouterr().out.splitlines()
    assert re.match(r"disc \(1 of 2\): J [\d.]+  F [\d.]+, 1 objects, 3 frames$", first)
    assert f"J&F {written['davis_jf_mean']:.2f}  (2 videos, 3 objects)" in last
    assert sorted(path.name for path in (masks / "pair").iterdir()) == [
        "00000.png", "00001.png", "00002.png",
    ]  # fmt: skip
    with Image.open(sheet) as image:
        assert image.height == 2 * (160 + 18)
    follow(parse_davis(argv), CPU)  # again: of the masks that are there
    assert "3 frames, kept masks" in capsys.readouterr().out
    assert json.loads(output.read_text()) == written


def test_two_processes_find_what_one_does(data, tmp_path):
    argv = flags(data, "--output", tmp_path / "two.json", "--masks", tmp_path / "two")
    done = run_as_torchrun("pretrain/davis.py", *argv)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("3 frames\n") == 2
    argv = flags(data, "--output", tmp_path / "one.json", "--masks", tmp_path / "two")
    follow(parse_davis(argv), CPU)
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


def test_settings_reach_the_propagation(data, tmp_path, capsys):
    """One source of the first frame alone leaves other masks than ten of all."""
    for name, more in (("a", ()), ("b", ("--top-k", 1, "--radius", 1, "--context", 1))):
        follow(parse_davis(flags(data, "--masks", tmp_path / name, *more)), CPU)
    settings = json.loads((tmp_path / "b" / "settings.json").read_text())
    del settings["weights"]
    assert settings == {
        "image_size": None, "top_k": 1, "temperature": 0.05, "radius": 1.0, "context": 1,
    }  # fmt: skip
    masks = [Image.open(tmp_path / name / "pair" / "00002.png") for name in "ab"]
    assert not np.array_equal(*map(np.array, masks))


def test_bad_input_is_told_before_the_work(data, tmp_path):
    for more, message in (
        (["--top-k", 0], "--top-k must be at least 1"),
        (["--radius", 0], "--radius must be at least 1"),
        (["--temperature", 0], "--temperature must be above 0"),
        (["--split", "../val"], "--split ../val: it is the name of a list"),
        (["--split", "test"], "no list .*test.txt: download"),
        (["--sheet", "x.jpg"], "the sheet is a .png"),
        (["--output", tmp_path], "it is a folder"),
        (["--masks", data / "ImageSets/2017/val.txt"], "cannot write to --masks"),
    ):
        with pytest.raises(UserError, match=message):
            follow(parse_davis(flags(data, *more)), CPU)
