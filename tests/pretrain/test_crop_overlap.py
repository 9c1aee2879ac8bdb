"""The command that draws crops: what it prints and writes, and what it refuses."""

import re

import numpy as np
import pytest
from PIL import Image

from moco_det.common.errors import UserError
from pretrain.crop_overlap import main


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "a.png"
    Image.fromarray(np.full((30, 40, 3), 128, np.uint8)).save(path)
    (tmp_path / "data" / "broken.jpg").write_bytes(b"no image")
    return path


def test_the_histogram_and_how_many_pairs_do_not_overlap(photo, tmp_path, capsys):
    for data in ([], [str(photo.parent)]):
        main([*data, "--output", str(tmp_path / "ious.png"), "--pairs", "500"])
        said = capsys.readouterr().out
        found = re.match(
            r"\S+/ious.png: 500 pairs of crops of 0.2 to 1 of the area: (\S+)% do not overlap, "
            r"mean IoU (\S+), median \S+$",
            said,
        )
        assert float(found[1]) < 2 and 0.4 < float(found[2]) < 0.5
        with Image.open(tmp_path / "ious.png") as picture:
            assert picture.size == (720, 440)
    main(["--output", str(tmp_path / "ious.png"), "--pairs", "100", "--min-iou", "0.5"])
    assert ": 0.00% do not overlap" in capsys.readouterr().out
    main(["--output", str(tmp_path / "ious.png"), "--pairs", "9", "--min-iou", "0.9999"])
    assert re.search(r"; \d are outside the limits: no draw met them$", capsys.readouterr().out)


def test_the_small_crops_of_an_image(photo, tmp_path, capsys):
    main(["--image", str(photo), "--output", str(tmp_path / "crops.png"), "--constrained", "0"])
    assert capsys.readouterr().out.endswith(
        "12 of 12 small crops have 0 of their area or more in the key's crop\n"
    )
    with Image.open(tmp_path / "crops.png") as picture:
        assert picture.size == (40, 30)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output a.jpg", "--output a.jpg: the picture is a .png"),
        ("--output absent/a.png", "there is no folder absent"),
        ("--output a.png --min-iou nan", "--min-iou nan: it takes numbers from 0 to 1"),
        ("--output a.png --small-scale 0.2 0.1", "--small-scale 0.2 0.1: it takes"),
        ("--output a.png --crop-min 0.9 --max-iou 0.1", "--max-iou 0.1 cannot be met"),
        ("--output a.png --image absent.png", "cannot read image absent.png"),
        ("absent --output a.png", "no such folder: absent"),
        ("data --output a.png --image b.png", "--image b.png is all that is drawn: drop it"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(words.split())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_readable_image(photo, tmp_path):
    photo.unlink()
    with pytest.raises(UserError, match="no readable image among"):
        main([str(photo.parent), "--output", str(tmp_path / "ious.png")])
