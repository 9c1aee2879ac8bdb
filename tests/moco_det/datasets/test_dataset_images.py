"""Images that a data set lists and that are not there, or not as it says."""

import os

import pytest
from PIL import Image

from moco_det.common.errors import UserError
from moco_det.dataset_doctor import Report
from moco_det.datasets import Problems
from moco_det.datasets.dataset import check_images


def record(path, height=40, width=50):
    return {"file_name": str(path), "height": height, "width": width}


def test_each_is_named(tmp_path):
    Image.new("RGB", (50, 40)).save(tmp_path / "good.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "small.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    os.mkfifo(tmp_path / "fifo.png")
    names = ("good", "small", "bad", "fifo", "absent")
    records = [record(tmp_path / f"{name}.png") for name in names]
    report = Report("a")
    good = check_images([*records, record("/dev/zero")], report)
    assert [image.path.name for image in good] == ["good.png"]
    texts = [text for _, text in report.problems]
    assert texts[0] == f"{tmp_path}/absent.png does not exist"
    assert texts[1] == f"{tmp_path}/small.png is 30x20 pixels, its annotation says 50x40"
    assert texts[2].startswith(f"{tmp_path}/bad.png cannot be decoded: not an image")
    assert texts[3:] == [
        f"{tmp_path}/fifo.png cannot be decoded: not a regular file",
        "/dev/zero cannot be decoded: not a regular file",
    ]
    for bad in records[1:]:
        with pytest.raises(UserError, match=f"{bad['file_name']} "):
            check_images([records[0], bad], Problems())


def test_a_million_that_are_absent_are_one_problem(tmp_path):
    records = [record(tmp_path / f"{i}.jpg") for i in range(20_000)]
    report = Report("a")
    assert check_images(records, report) == []
    assert [text for _, text in report.problems] == [
        f"none of the 20,000 images exists; expected {tmp_path}/0.jpg"
    ]
