"""torchvision's data sets, from tiny folders in the layout of each; and damaged ones."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets

from moco_det.common.errors import UserError
from pretrain.data.benchmarks import BENCHMARKS, find_dataset
from pretrain.data.images import Loading
from pretrain.data.labelled import LabelledBatches, LabelledImages
from pretrain.evaluation.features import SplitFeatures

# Of each data set three images to train on and two to evaluate on; class 0 is one of each.
LABELS = [1, 0, 1], [0, 1]
COLOURS = {0: (200, 30, 30), 1: (30, 30, 200)}


def picture(path, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 40), COLOURS[label]).save(path, quality=95)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_cifar10(root, monkeypatch):
    """Six files, whose MD5 sums torchvision compares with those that it knows."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def dump(name, content):
        (folder / name).write_bytes(data := pickle.dumps(content))
        return [name, hashlib.md5(data).hexdigest()]

    def batch(labels):
        pixels = [np.repeat(np.array(COLOURS[label], np.uint8), 1024) for label in labels]
        return {"data": np.stack(pixels), "labels": labels}

    train, test = (dump(name, batch(labels)) for name, labels in zip("ab", LABELS, strict=True))
    name, md5 = dump("batches.meta", {"label_names": ["airplane", "cat"]})
    meta = {"filename": name, "key": "label_names", "md5": md5}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [train])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [test])
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)


def write_food101(root, monkeypatch):
    names = ["apple_pie", "sushi"]
    for split, labels in zip(("train", "test"), LABELS, strict=True):
        files = {name: [] for name in reversed(names)}
        for number, label in enumerate(labels):
            file = f"{names[label]}/{split}{number}"
            files[names[label]].append(file)
            picture(root / f"food-101/images/{file}.jpg", label)
        write(root / f"food-101/meta/{split}.json", json.dumps(files))


def write_pets(root, monkeypatch):
    for split, labels in zip(("trainval", "test"), LABELS, strict=True):
        lines = []
        for number, label in enumerate(labels):
            name = f"{('Abyssinian', 'beagle')[label]}_{number + 10 * len(labels)}"
            lines.append(f"{name} {label + 1} 1 1\n")
            picture(root / f"oxford-iiit-pet/images/{name}.jpg", label)
        write(root / f"oxford-iiit-pet/annotations/{split}.txt", "".join(lines))


def write_places365(root, monkeypatch):
    def check(name, text):
        write(root / name, text)
        return name, hashlib.md5(text.encode()).hexdigest()

    names, meta = ("/a/airfield", "/z/zen_garden"), {}
    categories = check("categories_places365.txt", f"{names[0]} 0\n{names[1]} 1\n")
    monkeypatch.setattr(datasets.Places365, "_CATEGORIES_META", categories)
    for split, folder, file, labels in (
        ("train-standard", "data_256_standard", "places365_train_standard.txt", LABELS[0]),
        ("val", "val_256", "places365_val.txt", LABELS[1]),
    ):
        lines = []
        for number, label in enumerate(labels):
            place = f"{names[label]}/{number}.jpg" if split != "val" else f"{number}.jpg"
            picture(root / folder / place.lstrip("/"), label)
            lines.append(f"{place} {label}\n")
        meta[split] = check(file, "".join(lines))
    monkeypatch.setattr(datasets.Places365, "_FILE_LIST_META", meta)


def write_cars(root, monkeypatch):
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["Acura", "Volvo"], dtype=object)
    scipy.io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    for split, file, labels in (
        ("train", "devkit/cars_train_annos.mat", LABELS[0]),
        ("test", "cars_test_annos_withlabels.mat", LABELS[1]),
    ):
        rows = [(label + 1, f"{number:05d}.jpg") for number, label in enumerate(labels)]
        for label, name in rows:
            picture(folder / f"cars_{split}" / name, label - 1)
        annotations = np.array(rows, dtype=[("class", object), ("fname", object)])
        scipy.io.savemat(folder / file, {"annotations": annotations})


def write_sun397(root, monkeypatch):
    names = ("a/abbey", "b/bar/inner")
    write(root / "SUN397/ClassName.txt", "".join(f"/{name}\n" for name in names))
    for split, labels in zip(("Training_01", "Testing_01"), LABELS, strict=True):
        files = [f"{names[label]}/sun_{split}{n}.jpg" for n, label in enumerate(labels)]
        for file, label in zip(files, labels, strict=True):
            picture(root / "SUN397" / file, label)
        write(root / f"SUN397/{split}.txt", "".join(f"/{file}\r\n" for file in files))


WRITERS = {
    "cifar10": write_cifar10, "food101": write_food101, "pets": write_pets,
    "places365": write_places365, "cars": write_cars, "sun397": write_sun397,
}  # fmt: skip
CLASSES = {
    "cifar10": ["airplane", "cat"], "food101": ["apple_pie", "sushi"],
    "pets": ["Abyssinian", "Beagle"], "places365": ["/a/airfield", "/z/zen_garden"],
    "cars": ["Acura", "Volvo"], "sun397": ["abbey", "bar/inner"],
}  # fmt: skip


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
