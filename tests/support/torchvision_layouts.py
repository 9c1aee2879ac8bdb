"""Tiny folders in the layouts of torchvision's classification data sets, each of five images."""

import hashlib
import json
import pickle

import numpy as np
import scipy.io
from PIL import Image
from torchvision import datasets

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

    names, meta = ("/z/zen_garden", "/a/airfield"), {}  # in no order
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
    "pets": ["Abyssinian", "Beagle"], "places365": ["/z/zen_garden", "/a/airfield"],
    "cars": ["Acura", "Volvo"], "sun397": ["abbey", "bar/inner"],
}  # fmt: skip
