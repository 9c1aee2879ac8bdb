"""Labelled images: class folders as in ImageNet, the lists of iNaturalist 2018, their batches.

Data sets that torchvision knows are in `benchmarks.py`, VOC's labels of several classes in
`voc_labels.py`.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import functional as TF

from moco_det.common.documents import shown
from moco_det.common.errors import UserError
from moco_det.common.images import UnreadableImage, read_image
from pretrain.data.images import (
    Loading,
    SampledBatches,
    UnreadableImages,
)
from pretrain.data.listing import (
    class_folders,
    find_images,
    fingerprint,
    read_lines,
    seen_alike,
)

INATURALIST = ("train_val2018", "train2018.json", "val2018.json")
LONGEST = 32  # short sides; of an image's length, what a central crop can be made of
INATURALIST_HOME = "https://github.com/visipedia/inat_comp/tree/master/2018"


@dataclass(frozen=True)
class LabelledSplit:
    """Train or val of a data set.

    Args:
        name: for messages.
        folder: what the paths are relative to.
        labels: class indices, one for each of the paths.
    """

    name: str
    folder: Path
    paths: list[str]
    labels: np.ndarray

    @property
    def fingerprint(self) -> dict:
        """For the processes of a run, and a checkpoint, to be compared by."""
        return fingerprint(map(os.fsencode, self.paths), self.labels)

    def file(self, index: int) -> str:
        """What image `index` is called in messages; a path, where it is a file of its own."""
        return str(self.folder / self.paths[index])

    def read(self, index: int) -> np.ndarray:
        """Image `index`, uint8 (H, W, 3). Raises UnreadableImage."""
        return read_image(self.file(index))

    def subset(self, indices: np.ndarray, name: str = "") -> "LabelledSplit":
        """Those of its images that have these indices, in this order.

        Args:
            name: for messages, instead of its own.
        """
        paths = [self.paths[index] for index in indices]
        return replace(self, name=name or self.name, paths=paths, labels=self.labels[indices])


@dataclass(frozen=True)
class LabelledArrays(LabelledSplit):
    """A split whose images are no files of their own.

    Args:
        images: uint8 (M, H, W, 3); the paths are names for messages.
    """

    images: np.ndarray = field(kw_only=True)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def subset(self, indices: np.ndarray, name: str = "") -> "LabelledArrays":
        return replace(super().subset(indices, name), images=self.images[indices])


Splits = tuple[list[str], LabelledSplit, LabelledSplit]


def find_splits(data: Path) -> Splits:
    """Names of the classes in the order of their indices, train and val. Collective.

    Raises UserError where a split is missing, the two do not agree, or processes see different
    ones.
    """
    return _seen_alike(lambda: _find_splits(data))


def _find_splits(data: Path) -> Splits:
    if any((data / name).exists() for name in INATURALIST):
        return find_inaturalist(data)
    return _find_class_folders(data, f", or iNaturalist 2018's {', '.join(INATURALIST)}")


def find_class_folders(data: Path) -> Splits:
    """`find_splits` of DATA/train/CLASS/IMAGE and DATA/val/CLASS/IMAGE alone. Collective."""
    return _seen_alike(lambda: _find_class_folders(data))


def _seen_alike(find: Callable[[], Splits]) -> Splits:
    return seen_alike(find, lambda found: [split.fingerprint for split in found[1:]])


def _find_class_folders(data: Path, alternative: str = "") -> Splits:
    """The classes are those of train."""
    for folder in (data / "train", data / "val"):
        if not class_folders(folder):
            raise UserError(
                f"{folder} has no class folders: DATA needs train/CLASS and val/CLASS{alternative}"
            )
    classes = class_folders(data / "train")
    return classes, *(list_class_folders(data / split, classes) for split in ("train", "val"))


def list_class_folders(folder: Path, classes: list[str]) -> LabelledSplit:
    """The CLASS/IMAGE files of `folder`. Raises UserError for a class that is not in `classes`."""
    paths = [path.decode(errors="surrogateescape") for path in find_images(folder)]
    labels = {name: i for i, name in enumerate(classes)}
    unknown = {path.split("/")[0] for path in paths} - set(labels)
    if unknown:
        raise UserError(
            f"{folder} has class folder(s) that the other split lacks: {sorted(unknown)[:5]}; "
            "make train and val agree"
        )
    indices = np.array([labels[path.split("/")[0]] for path in paths])
    return LabelledSplit(str(folder), folder, paths, indices)


# -- a part of the labels -------------------------------------------------------------------------


def class_balanced(split: LabelledSplit, share: float, seed: int) -> LabelledSplit:
    """A share of a split's images, drawn by the seed: as large a share of each class.

    Of every class at least one image is taken, as long as it has any.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(split.labels):
        members = np.flatnonzero(split.labels == label)
        chosen.append(rng.permutation(members)[: max(1, round(share * len(members)))])
    indices = np.sort(np.concatenate(chosen))
    return split.subset(indices, f"{100 * share:g} % of {split.name}")


def listed_images(split: LabelledSplit, path: Path) -> LabelledSplit:
    """Those images of a split that a file lists, in the order of the split.

    Each line is an image's path, absolute or in the split's folder or in that folder's parent, as
    subset.py has it, or its file's name alone, as in SimCLR's lists of 1 % and 10 % of ImageNet.

    Raises:
        UserError: the split lacks one of them, or has several of the name.
    """
    inner, whole = f"{split.folder.name}/", os.path.join(os.path.abspath(split.folder), "")
    wanted = {line.removeprefix(whole).removeprefix(inner) for line in read_lines(path)}
    if not wanted:
        raise UserError(f"--list {path} lists no image")
    index_of = {name: index for index, name in enumerate(split.paths) if name in wanted}
    missing = wanted - index_of.keys()
    alike: dict[str, list[int]] = {}
    for index, name in enumerate(split.paths):
        if os.path.basename(name) in missing:
            alike.setdefault(os.path.basename(name), []).append(index)
    absent = sorted(missing - alike.keys())
    if absent:
        raise UserError(
            f"--list {path} has {len(absent)} image(s) that {split.name} lacks: "
            f"{', '.join(shown(name) for name in absent[:3])}"
        )
    several = sorted(name for name, indices in alike.items() if len(indices) > 1)
    if several:
        raise UserError(
            f"--list {path}: {split.name} has several images called {several[0]}: write their "
            "paths within it"
        )
    indices = [*index_of.values(), *(indices[0] for indices in alike.values())]
    return split.subset(np.unique(indices), f"{path} of {split.name}")


# -- iNaturalist 2018 -----------------------------------------------------------------------------


def find_inaturalist(data: Path) -> tuple[list[str], LabelledSplit, LabelledSplit]:
    """The official layout of iNaturalist 2018; classes are the categories of train2018.json.

    Raises UserError where a file of it is missing, with what to download.
    """
    for name in INATURALIST:
        if not (data / name).exists():
            raise UserError(
                f"iNaturalist 2018 in {data} lacks {name}: download {name}.tar.gz, linked at "
                f"{INATURALIST_HOME}, and unpack it there"
            )
    lists = {name: read_inaturalist(data / name) for name in ("train2018.json", "val2018.json")}
    categories = sorted(lists["train2018.json"][0])
    splits = []
    for name, (_, paths, labels) in lists.items():
        unknown = set(labels) - set(categories)
        if unknown:
            raise UserError(
                f"{data / name} has categories that train2018.json does not list: "
                f"{sorted(unknown)[:5]}"
            )
        indices = np.searchsorted(categories, labels)
        splits.append(LabelledSplit(str(data / name), data, paths, indices))
    return [str(category) for category in categories], *splits


def read_inaturalist(path: Path) -> tuple[set[int], list[str], list[int]]:
    """Categories of a list in COCO's format; path and category of each of its images.

    Raises UserError for a file of another format.
    """
    try:
        content = json.loads(path.read_text())
        categories = {category["id"] for category in content["categories"]}
        paths = {image["id"]: image["file_name"] for image in content["images"]}
        labels = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
        if not all(type(number) is int for number in (*categories, *labels.values())):
            raise ValueError("its category ids must be whole numbers")
        if not all(isinstance(name, str) for name in paths.values()):
            raise ValueError("its file names must be texts")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        raise UserError(f"{path} is no list in COCO's format: {lacks}{error}") from error
    if not paths or paths.keys() != labels.keys():
        odd = sorted(paths.keys() ^ labels.keys())[:5]
        raise UserError(f"{path} needs one annotation for every image; not so for ids {odd}")
    return categories, list(paths.values()), [labels[image] for image in paths]


# -- crops and batches ----------------------------------------------------------------------------


class LabelledImages(Dataset):
    """index -> view (S, S, 3) uint8 and class index; -1 - index for an unreadable image.

    Args:
        image_size: S.
        transform: image (H, W, 3), uint8 -> view (S, S, 3).
    """

    def __init__(self, split: LabelledSplit, image_size: int, transform: Callable):
        self.split = split
        self.image_size = image_size
        self.transform = transform

    def __len__(self) -> int:
        return len(self.split.paths)

    def unreadable(self, labels: torch.Tensor) -> set[str]:
        """The files that loaded `labels` say are unreadable, each with the reason."""
        return {self._unreadable(index) for index in (-1 - labels[labels < 0]).tolist()}

    def _unreadable(self, index: int) -> str:
        try:
            self.split.read(index)  # once more: a label has no room for the reason
        except UnreadableImage as error:
            return f"{error.name}: {error.reason}"
        return f"{self.split.file(index)}: it could not be read a moment ago"

    def __getitem__(self, index: int):
        try:
            image = self.split.read(index)
        except UnreadableImage:
            return np.zeros((self.image_size, self.image_size, 3), np.uint8), -1 - index
        return self.transform(image), self.split.labels[index]


class RandomCrops(LabelledImages):
    """(epoch, index) -> a random crop (S, S, 3) uint8, flipped or not, and its label.

    The draws are torchvision's, seeded by (seed, epoch, index) alone.
    """

    def __init__(self, split: LabelledSplit, image_size: int, seed: int):
        crop, flip = transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip()
        transform = transforms.Compose([Image.fromarray, crop, flip, np.array])
        super().__init__(split, image_size, transform)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        words = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(words[0]))
            return super().__getitem__(index)


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Short side to 256/224 of `size`, then the central `size` x `size`, by torchvision.

    An image whose short side is `size` already (CIFAR at 32) is not enlarged first, as is usual.
    """
    picture = Image.fromarray(central_part(image))
    if min(picture.size) != size:
        picture = TF.resize(picture, round(size * 256 / 224))
    return np.array(TF.center_crop(picture, size))


def central_part(image: np.ndarray) -> np.ndarray:
    """The image (H, W, 3), or of one that is longer than LONGEST short sides so many: 1 x 20,000
    pixels would be resized to 256 x 5,120,000."""
    most = LONGEST * min(image.shape[:2])
    top, left = (max(0, side - most) // 2 for side in image.shape[:2])
    return image[top : top + most, left : left + most]


class LabelledBatches(SampledBatches):
    """Random crops N x S x S x 3, uint8, of this process's share of a batch, and labels N.

    Labels are -1 for unreadable images.
    """

    def __init__(self, split: LabelledSplit, image_size: int, loading: Loading):
        self.crops = RandomCrops(split, image_size, loading.seed)
        super().__init__(self.crops, loading)
        self.unreadable = UnreadableImages(self.samples, loading.max_unreadable, left_out=True)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return map(self._checked, self.loader)

    def _checked(self, batch: tuple[torch.Tensor, torch.Tensor]):
        images, labels = batch
        self.unreadable.add(self.crops.unreadable(labels))
        return images, labels.clamp(min=-1)
