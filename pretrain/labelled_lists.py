"""Lists of labelled images: class folders as in ImageNet, and the lists of iNaturalist 2018."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.errors import UserError
from pretrain.images import find_images

INATURALIST = ("train_val2018", "train2018.json", "val2018.json")
INATURALIST_HOME = "https://github.com/visipedia/inat_comp/tree/master/2018"


@dataclass(frozen=True)
class LabelledList:
    """One part of a data set.

    Args:
        name: for messages.
        folder: what the paths are relative to.
        labels: class indices, one for each of the paths.
    """

    name: str
    folder: Path
    paths: list[str]
    labels: np.ndarray


def find_parts(data: Path) -> tuple[list[str], LabelledList, LabelledList]:
    """Names of the classes in the order of their indices, train and val.

    Raises UserError where a part is missing or the two do not agree.
    """
    if any((data / name).exists() for name in INATURALIST):
        return find_inaturalist(data)
    for part in (data / "train", data / "val"):
        if not part.is_dir() or not class_folders(part):
            raise UserError(
                f"{part} has no class folders: DATA needs train/CLASS and val/CLASS, or "
                f"iNaturalist 2018's {', '.join(INATURALIST)}"
            )
    classes = class_folders(data / "train")
    return classes, *(list_class_folders(data / part, classes) for part in ("train", "val"))


def class_folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def list_class_folders(folder: Path, classes: list[str]) -> LabelledList:
    """The CLASS/IMAGE files of `folder`. Raises UserError for a class that is none of `classes`."""
    paths = [path.decode(errors="surrogateescape") for path in find_images(folder)]
    labels = {name: i for i, name in enumerate(classes)}
    unknown = {path.split("/")[0] for path in paths} - set(labels)
    if unknown:
        raise UserError(
            f"{folder} has class folder(s) that the other part lacks: {sorted(unknown)[:5]}; "
            "make train and val agree (pretraining goes without labels at --knn-every 0)"
        )
    indices = np.array([labels[path.split("/")[0]] for path in paths])
    return LabelledList(str(folder), folder, paths, indices)


def find_inaturalist(data: Path) -> tuple[list[str], LabelledList, LabelledList]:
    """The official layout of iNaturalist 2018; classes are the categories of train2018.json.

    Raises UserError where a part of it is missing, with what to download.
    """
    for name in INATURALIST:
        if not (data / name).exists():
            raise UserError(
                f"iNaturalist 2018 in {data} lacks {name}: download {name}.tar.gz, linked at "
                f"{INATURALIST_HOME}, and unpack it there"
            )
    categories, *train = read_inaturalist(data / "train2018.json")
    _, *val = read_inaturalist(data / "val2018.json")
    indices = {category: i for i, category in enumerate(sorted(categories))}
    parts = []
    for name, (paths, labels) in (("train2018.json", train), ("val2018.json", val)):
        unknown = set(labels) - set(indices)
        if unknown:
            raise UserError(
                f"{data / name} has categories that train2018.json does not list: "
                f"{sorted(unknown)[:5]}"
            )
        labels = np.array([indices[label] for label in labels])
        parts.append(LabelledList(str(data / name), data, paths, labels))
    return [str(category) for category in indices], *parts


def read_inaturalist(path: Path) -> tuple[set[int], list[str], list[int]]:
    """Categories of a list in COCO's format; path and category of each of its images.

    Raises UserError for a file of another format.
    """
    try:
        content = json.loads(path.read_text())
        categories = {category["id"] for category in content["categories"]}
        paths = {image["id"]: image["file_name"] for image in content["images"]}
        labels = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
    except (ValueError, TypeError, KeyError) as error:
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        raise UserError(f"{path} is no list in COCO's format: {lacks}{error}") from error
    if not paths or paths.keys() != labels.keys():
        odd = sorted(paths.keys() ^ labels.keys())[:5]
        raise UserError(f"{path} needs one annotation for every image; not so for ids {odd}")
    return categories, list(paths.values()), [labels[image] for image in paths]
