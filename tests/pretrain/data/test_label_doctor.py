"""The doctor of labelled data: what was broken by hand is found, and nothing else."""

import pytest
from noisy_colours import write_images
from torchvision_layouts import write_cifar10, write_food101

from pretrain.data.label_doctor import examine_labels


def problems(report) -> dict[str, int]:
    kinds = [kind for kind, _ in report.problems]
    return {kind: kinds.count(kind) for kind in kinds}


def test_class_folders_without_a_fault_and_with_one(tmp_path):
    write_images(tmp_path)
    train, val = examine_labels("folders", tmp_path, None)
    assert (train.images, train.classes, train.decoded, train.published) == (50, 2, 50, None)
    assert train.problems == val.problems == []
    (tmp_path / "train/a/03.png").write_bytes(b"broken")
    train, val = examine_labels("folders", tmp_path, None)
    ((kind, text),) = train.problems
    assert (kind, text.partition("train/")[2]) == (
        "image",
        "a/03.png cannot be decoded: not an image",
    )
    sample, _ = examine_labels("folders", tmp_path, 2)  # the first and the last
    assert (sample.decoded, sample.problems) == (2, [])


def test_counts_are_compared_and_missing_images_named(tmp_path, monkeypatch):
    write_food101(tmp_path, monkeypatch)
    (tmp_path / "food-101/images/apple_pie/test0.jpg").unlink()
    train, test = examine_labels("food101", tmp_path, None)
    assert problems(train) == {"classes": 1, "count": 1}
    assert ("count", "3 images; published are 75750") in train.problems
    assert problems(test) == {"classes": 1, "count": 1, "missing": 1}
    assert test.problems[-1][1].endswith("apple_pie/test0.jpg does not exist")
    assert (test.decoded, test.published) == (1, 25_250)


def test_images_that_are_no_files_are_there(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    train, test = examine_labels("cifar10", tmp_path, None)
    assert (train.decoded, test.decoded) == (3, 2)
    assert problems(train) == {"classes": 1, "count": 1}


@pytest.mark.parametrize("name", ["sun397", "voc2007", "folders"])
def test_a_wrong_layout_is_the_one_problem(tmp_path, name):
    (report,) = examine_labels(name, tmp_path, None)
    ((kind, text),) = report.problems
    assert kind == "layout"
    assert str(tmp_path) in text
    assert report.images is None
