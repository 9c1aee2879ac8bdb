"""Classification data sets that torchvision reads: where each lies, its splits, its counts.

torchvision finds, checks and downloads the files; images go through our own reader. The transfer of
"Revisiting Contrastive Methods" (arXiv:2106.05967, Table 2) is measured on them.

Splits are the official ones: of Pets trainval and test; of Places365 train-standard and val, since
the labels of test are not public; of SUN397 the first of the ten partitions, as others report it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision import datasets

from moco_det.common.errors import UserError, import_optional, nearest, one_line
from moco_det.common.processes import on_main, print_on_main
from pretrain.data.labelled import (
    LabelledArrays,
    LabelledSplit,
    Splits,
    find_splits,
)
from pretrain.data.listing import read_lines, seen_alike

FOLDERS = "folders"  # no data set of torchvision: class folders, or iNaturalist 2018
Found = tuple[list[str], LabelledSplit]  # classes and one split


@dataclass(frozen=True)
class Benchmark:
    """One data set.

    Args:
        title: as its authors call it.
        layout: what DATA has to hold.
        home: where it comes from.
        images: of train and of the split that is evaluated on, and classes, as published.
        read: (DATA, whether for training, whether to download) -> classes and split.
        downloads: whether torchvision can fetch it.
    """

    title: str
    layout: str
    home: str
    images: tuple[int, int]
    classes: int
    read: Callable[[Path, bool, bool], Found]
    downloads: bool = True


# -- one reader for each --------------------------------------------------------------------------


def _cifar10(data: Path, train: bool, download: bool) -> Found:
    found = datasets.CIFAR10(data, train=train, download=download)  # compares MD5 sums
    labels, name = np.array(found.targets), "train" if train else "test"
    names = [f"{name}/{number:05d}" for number in range(len(labels))]
    folder = data / found.base_folder
    return list(found.classes), LabelledArrays(name, folder, names, labels, images=found.data)


def _food101(data: Path, train: bool, download: bool) -> Found:
    found = datasets.Food101(data, split="train" if train else "test", download=download)
    return list(found.classes), _files(data, found._image_files, found._labels, found._split)


def _pets(data: Path, train: bool, download: bool) -> Found:
    found = datasets.OxfordIIITPet(data, split="trainval" if train else "test", download=download)
    return list(found.classes), _files(data, found._images, found._labels, found._split)


def _cars(data: Path, train: bool, download: bool) -> Found:
    import_optional("scipy.io", "reading Stanford Cars", "scipy")
    found = datasets.StanfordCars(data, split="train" if train else "test")
    paths, labels = zip(*found._samples, strict=True)
    return list(found.classes), _files(data, paths, labels, "train" if train else "test")


def _places365(data: Path, train: bool, download: bool) -> Found:
    """Of the two sizes that are published the larger one, where it is there."""
    split, large = ("train-standard", "data_large_standard") if train else ("val", "val_large")
    small = not (data / large).is_dir()
    found = datasets.Places365(data, split=split, small=small, download=download)
    paths, labels = zip(*found.imgs, strict=True)
    classes = sorted(found.class_to_idx, key=found.class_to_idx.get)  # its own list is by name
    return classes, _files(data, paths, labels, split)


def _sun397(data: Path, train: bool, download: bool) -> Found:
    """torchvision knows no split of it: its lists are those of the official first partition."""
    found = datasets.SUN397(data, download=download)
    name, home = "Training_01.txt" if train else "Testing_01.txt", data / "SUN397"
    places = [folder / name for folder in (home, home / "Partitions", data / "Partitions", data)]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise UserError(
            f"there is no {places[0]}: unpack Partitions.zip of "
            "https://vision.princeton.edu/projects/2010/SUN/download/ there"
        )
    images = [line.lstrip("/") for line in read_lines(path)]
    labels = [found.class_to_idx["/".join(image.split("/")[1:-1])] for image in images]
    return list(found.classes), _files(data, [home / image for image in images], labels, path.stem)


def _files(data: Path, paths, labels, name: str) -> LabelledSplit:
    """A split of files below `data`. Raises UserError where the first of them is not there."""
    names = [os.path.relpath(path, data) for path in paths]
    if names and not os.path.lexists(data / names[0]):
        raise UserError(f"there is no {data / names[0]}, which its lists begin with")
    return LabelledSplit(f"{name} of {data}", data, names, np.array(labels, dtype=np.int64))


BENCHMARKS = {
    "cifar10": Benchmark(
        "CIFAR-10", "cifar-10-batches-py/", "https://www.cs.toronto.edu/~kriz/cifar.html",
        (50_000, 10_000), 10, _cifar10,
    ),
    "food101": Benchmark(
        "Food-101", "food-101/images/ and food-101/meta/",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        (75_750, 25_250), 101, _food101,
    ),
    "pets": Benchmark(
        "Oxford-IIIT Pets", "oxford-iiit-pet/images/ and oxford-iiit-pet/annotations/",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
        (3_680, 3_669), 37, _pets,
    ),
    "places365": Benchmark(
        "Places365-Standard",
        "categories_places365.txt, places365_train_standard.txt, places365_val.txt, and "
        "data_256_standard/ with val_256/, or data_large_standard/ with val_large/",
        "http://places2.csail.mit.edu/",
        (1_803_460, 36_500), 365, _places365,
    ),
    "cars": Benchmark(
        "Stanford Cars",
        "stanford_cars/ with devkit/, cars_train/, cars_test/, cars_test_annos_withlabels.mat",
        "its authors' page, which is gone; see https://github.com/pytorch/vision/issues/7545",
        (8_144, 8_041), 196, _cars, downloads=False,
    ),
    "sun397": Benchmark(
        "SUN397", "SUN397/ with ClassName.txt and the official lists Training_01.txt, "
        "Testing_01.txt",
        "https://vision.princeton.edu/projects/2010/SUN/",
        (19_850, 19_850), 397, _sun397,
    ),
}  # fmt: skip


# -- any of them ----------------------------------------------------------------------------------


def find_dataset(name: str, data: Path, download: bool = False) -> Splits:
    """`find_splits` of DATA, or, where `name` is one of BENCHMARKS, of that data set in DATA.

    It prints a line where the counts are not those of the official data set. Collective.

    Args:
        download: have torchvision fetch what is not there; on the main process.

    Raises:
        UserError: it is not there, damaged or not as expected; names the folder.
    """
    if name == FOLDERS:
        if download:
            raise UserError(f"--download needs --dataset, one of {', '.join(BENCHMARKS)}")
        return find_splits(data)
    benchmark = known(name)
    if download:
        on_main(read_splits, benchmark, data, True)
    found = seen_alike(
        lambda: read_splits(benchmark, data),
        lambda splits: [split.fingerprint for split in splits[1:]],
    )
    for line in unlike_published(benchmark, found):
        print_on_main(f"note: {line}")
    return found


def known(name: str) -> Benchmark:
    """Raises UserError that names the nearest one."""
    if name not in BENCHMARKS:
        others = ", ".join([FOLDERS, *BENCHMARKS])
        raise UserError(f"--dataset {name}{nearest(name, BENCHMARKS)}; there are {others}")
    return BENCHMARKS[name]


def read_splits(benchmark: Benchmark, data: Path, download: bool = False) -> Splits:
    """Classes, train and the split that is evaluated on. Raises UserError: see `find_dataset`."""
    if download and not benchmark.downloads:
        raise UserError(f"torchvision cannot fetch {benchmark.title}: {_wanted(benchmark)}")
    try:
        classes, train = benchmark.read(data, True, download)
        others, val = benchmark.read(data, False, download)
    except UserError as error:
        raise UserError(f"{data} does not hold {benchmark.title}: {error}") from error
    except Exception as error:  # of any kind: its lists are parsed without checks
        reason = one_line(f"{type(error).__name__}: {error}", 240).rstrip(".")
        reason = reason.removeprefix("RuntimeError: ").replace("download=True", "--download")
        raise UserError(
            f"{data} does not hold {benchmark.title}: {reason}; {_wanted(benchmark)}"
        ) from error
    if classes != others:
        raise UserError(f"{data}: train and test of {benchmark.title} have other classes")
    for split in (train, val):
        _check_labels(split, len(classes), data)
    return classes, train, val


def _wanted(benchmark: Benchmark) -> str:
    return f"DATA needs {benchmark.layout} (from {benchmark.home})"


def _check_labels(split: LabelledSplit, classes: int, data: Path) -> None:
    if not len(split.labels):
        raise UserError(f"{split.name} lists no image")
    outside = split.labels[(split.labels < 0) | (split.labels >= classes)]
    if len(outside):
        raise UserError(
            f"{split.name} has the label {outside[0]}; there are {classes} classes, counted from 0"
        )


def unlike_published(benchmark: Benchmark, found: Splits) -> list[str]:
    """What differs from the counts of the official data set, in a line each."""
    classes, *splits = found
    lines = []
    if len(classes) != benchmark.classes:
        lines.append(f"{benchmark.title} has {benchmark.classes} classes, here are {len(classes)}")
    for split, count in zip(splits, benchmark.images, strict=True):
        if len(split.labels) != count:
            here = f"{len(split.labels)} in {split.name}"
            lines.append(f"{benchmark.title} has {count} images there, here are {here}")
    return lines
