"""iNaturalist 2018's lists, written by hand."""

import json

import numpy as np
import pytest

from moco_det.common.errors import UserError
from pretrain.data.labelled import find_splits


def write_list(path, images: dict[int, str], labels: dict[int, int], categories=(3, 7, 12)):
    """The fields of the official lists that matter, and some that do not."""
    content = {
        "info": {"year": 2018},
        "images": [{"id": i, "file_name": name, "width": 8} for i, name in images.items()],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c} for n, (i, c) in enumerate(labels.items())
        ],
        "categories": [{"id": c, "name": f"species {c}"} for c in categories],
    }
    path.write_text(json.dumps(content))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "train_val2018").mkdir()
    train = {50: "train_val2018/Aves/7/b.jpg", 51: "train_val2018/Fungi/12/c.jpg"}
    write_list(tmp_path / "train2018.json", train, {51: 12, 50: 7})
    write_list(tmp_path / "val2018.json", {9: "train_val2018/Aves/3/a.jpg"}, {9: 3})
    return tmp_path


def test_the_lists_give_paths_and_class_indices(data):
    classes, train, val = find_splits(data)
    assert classes == ["3", "7", "12"]  # in the order of the ids, not of their names
    assert train.folder == val.folder == data
    assert train.paths == ["train_val2018/Aves/7/b.jpg", "train_val2018/Fungi/12/c.jpg"]
    assert np.array_equal(train.labels, [1, 2])
    assert val.paths == ["train_val2018/Aves/3/a.jpg"]
    assert np.array_equal(val.labels, [0])


@pytest.mark.parametrize("name", ["train_val2018", "train2018.json", "val2018.json"])
def test_what_is_missing_is_named_with_its_source(data, name):
    path = data / name
    path.rmdir() if path.is_dir() else path.unlink()
    message = f"lacks {name}: download {name}.tar.gz, linked at https://github.com/visipedia/inat"
    with pytest.raises(UserError, match=message):
        find_splits(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "train2018.json is no list in COCO's format"),
        ("[]", "train2018.json is no list in COCO's format"),
        ('{"images": [], "categories": []}', "it lacks 'annotations'"),
        ('{"images": [], "categories": [], "annotations": []}', "one annotation for every image"),
    ],
    ids=["json", "list", "key", "empty"],
)
def test_a_file_of_another_format_is_refused(data, content, message):
    (data / "train2018.json").write_text(content)
    with pytest.raises(UserError, match=message):
        find_splits(data)


def test_an_image_without_a_label_is_refused(data):
    write_list(data / "val2018.json", {9: "a.jpg", 10: "b.jpg"}, {9: 3})
    with pytest.raises(UserError, match=r"val2018.json needs one annotation .* ids \[10\]"):
        find_splits(data)


def test_a_category_of_val_alone_is_refused(data):
    write_list(data / "val2018.json", {9: "a.jpg"}, {9: 4})
    with pytest.raises(UserError, match=r"val2018.json has categories .* \[4\]"):
        find_splits(data)


def test_neither_layout_is_said(tmp_path):
    with pytest.raises(UserError, match="needs train/CLASS and val/CLASS, or iNaturalist 2018"):
        find_splits(tmp_path)
