"""torchvision's data sets, from tiny folders in the layout of each; and damaged ones."""

import hashlib

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision_layouts import (
    CLASSES,
    COLOURS,
    LABELS,
    WRITERS,
    picture,
    write_food101,
    write_places365,
)

from moco_det.common.errors import UserError
from pretrain.data.benchmarks import BENCHMARKS, find_dataset
from pretrain.data.images import Loading
from pretrain.data.labelled import LabelledBatches, LabelledImages
from pretrain.evaluation.features import SplitFeatures


@pytest.fixture(params=sorted(BENCHMARKS))
def benchmark(request, tmp_path, monkeypatch):
    """The name of a data set that lies in `tmp_path`."""
    WRITERS[request.param](tmp_path, monkeypatch)
    return request.param


def test_each_is_read_from_its_own_layout(benchmark, tmp_path, capsys):
    """Every image has the colour of its label; features of the whole data set come out of it."""
    classes, *splits = find_dataset(benchmark, tmp_path)
    assert classes == CLASSES[benchmark]
    loading = Loading(2, 0, 0, False, 0)
    for split, labels in zip(splits, LABELS, strict=True):
        assert sorted(split.labels.tolist()) == sorted(labels)
        images = LabelledImages(split, 40, lambda image: image)
        for view, label in (images[index] for index in range(len(images))):
            assert np.abs(view.mean(axis=(0, 1)) - COLOURS[label]).max() < 6, split.name
        mean = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        found, numbers = SplitFeatures(split, 32, loading, torch.device("cpu"), None).compute(mean)
        assert ((found[:, 0] > found[:, 2]) == (numbers == 0)).all()
    (batch,) = LabelledBatches(splits[0], 32, loading)
    assert batch[0].shape == (2, 32, 32, 3)
    said = capsys.readouterr().out
    assert said.count("note: ") == 3  # classes and both counts are not the official ones
    assert f"has {BENCHMARKS[benchmark].images[0]} images there, here are 3 in" in said


def test_an_empty_folder_is_told_what_it_needs(tmp_path):
    for name, found in BENCHMARKS.items():
        with pytest.raises(UserError) as refused:
            find_dataset(name, tmp_path)
        message = str(refused.value)
        assert message.startswith(f"{tmp_path} does not hold {found.title}: "), message
        assert f"; DATA needs {found.layout} (from {found.home}" in message
        assert "download=True" not in message
        assert "\n" not in message


def test_a_part_of_an_image_list_is_a_part_of_the_split(benchmark, tmp_path):
    _, train, _ = find_dataset(benchmark, tmp_path)
    part = train.subset(np.array([2, 0]), "some")
    assert (part.name, part.paths) == ("some", [train.paths[2], train.paths[0]])
    assert np.array_equal(part.read(1), train.read(0))
    assert part.labels.tolist() == train.labels[[2, 0]].tolist()
    assert part.fingerprint != train.fingerprint


@pytest.mark.parametrize(
    ("name", "path", "content", "message"),
    [
        ("cifar10", "cifar-10-batches-py/a", b"other", "Dataset not found or corrupted"),
        ("food101", "food-101/meta/test.json", b"{", "JSONDecodeError"),
        ("pets", "oxford-iiit-pet/annotations/test.txt", b"Abyssinian_1 one 1 1", "ValueError"),
        ("places365", "places365_val.txt", b"x 0", "does not exist or is corrupted"),
        ("cars", "stanford_cars/cars_test_annos_withlabels.mat", b"MATLAB", "does not hold"),
        ("sun397", "SUN397/Testing_01.txt", b"/a/abbot/sun_1.jpg", "KeyError: 'abbot'"),
        ("sun397", "SUN397/Testing_01.txt", None, r"no .*Testing_01\.txt: unpack Partitions\.zip"),
        ("food101", "food-101/images/sushi/train0.jpg", None, "which its lists begin with"),
        ("pets", "oxford-iiit-pet/annotations/test.txt", b"beagle_1 9 1 1", "other classes"),
    ],
)
def test_damage_is_one_line(tmp_path, monkeypatch, name, path, content, message):
    WRITERS[name](tmp_path, monkeypatch)
    if content is None:
        (tmp_path / path).unlink()
    else:
        (tmp_path / path).write_bytes(content)
        if b"beagle_1" in content:
            picture(tmp_path / "oxford-iiit-pet/images/beagle_1.jpg", 0)
    with pytest.raises(UserError, match=message) as refused:
        find_dataset(name, tmp_path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_label_beyond_the_classes_is_refused(tmp_path, monkeypatch):
    write_places365(tmp_path, monkeypatch)
    text = "/a/airfield/1.jpg 5\n"
    check = "places365_val.txt", hashlib.md5(text.encode()).hexdigest()
    (tmp_path / check[0]).write_text(text)
    monkeypatch.setitem(datasets.Places365._FILE_LIST_META, "val", check)
    picture(tmp_path / "val_256/a/airfield/1.jpg", 0)
    with pytest.raises(UserError, match="has the label 5; there are 2 classes, counted from 0"):
        find_dataset("places365", tmp_path)


def test_downloads_are_torchvision_s_and_asked_for(tmp_path, monkeypatch):
    asked = []

    def fetch(self):
        asked.append(self.root)
        write_food101(tmp_path, monkeypatch)

    monkeypatch.setattr(datasets.Food101, "_download", fetch)
    with pytest.raises(UserError, match="You can use --download"):
        find_dataset("food101", tmp_path)
    assert not asked
    find_dataset("food101", tmp_path, download=True)
    assert asked
    with pytest.raises(UserError, match="torchvision cannot fetch Stanford Cars: DATA needs"):
        find_dataset("cars", tmp_path, download=True)
    with pytest.raises(UserError, match="--download needs --dataset, one of cifar10"):
        find_dataset("folders", tmp_path, download=True)
    with pytest.raises(UserError, match="did you mean food101"):
        find_dataset("food-101", tmp_path)
