"""PASCAL VOC's layout: XML annotations, split lists."""

import codecs
import functools
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

from moco_det.common.errors import UserError
from moco_det.common.files import read_regular
from moco_det.common.images import image_size
from moco_det.datasets.dataset import NOTHING, REACH, Dataset, Record, Wanted, require
from moco_det.datasets.problems import LONGEST_NAME, MOST_ALIKE, Problems, refuse_each, shown

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)
# fmt: on


@dataclass(frozen=True)
class VocDataset(Dataset):
    """PASCAL VOC layout. `eleven_point`: AP as in VOC 2007, not as the area under the curve."""

    evaluator: ClassVar[str] = "voc"
    form: ClassVar[str] = "ROOT:SPLIT"
    root: Path
    split: str
    eleven_point: bool = False

    @classmethod
    def open(
        cls,
        name: str,
        first: Path,
        second: str,
        data_root: Path | None = None,
        problems: Problems | None = None,
    ) -> "VocDataset":
        dataset = cls(name, VOC_CLASSES, first, second, name.startswith("voc_2007_"))
        require(name, dataset.required, data_root)
        if data_root is not None:
            return dataset
        classes = _classes_in(dataset.annotation_dir, problems or Problems())
        return replace(dataset, classes=classes)

    @property
    def required(self) -> tuple[Path, ...]:
        return self.image_dir, self.annotation_dir, self.split_file

    @property
    def image_dir(self) -> Path:
        return self.root / "JPEGImages"

    @property
    def annotation_dir(self) -> Path:
        return self.root / "Annotations"

    @property
    def split_file(self) -> Path:
        return self.root / "ImageSets" / "Main" / f"{self.split}.txt"

    def records(self, problems: Problems | None = None, wanted: Wanted = NOTHING) -> list[Record]:
        """As in `Dataset`; an annotation also has "difficult", 0 or 1.

        As in Detectron2, the image id is the file's stem, difficult objects are kept, and the
        1-based inclusive pixels of the file become continuous by subtracting 1 from xmin and ymin.
        """
        problems = problems or Problems()
        image_of, ids = self.image_files(), read_split(self.split_file, problems)
        if not ids:
            problems.flaw("list", f"{self.split_file} lists no image")
        annotated = set(os.listdir(self.annotation_dir))
        objects, records = 0, []
        absent = [image_id for image_id in ids if image_id not in image_of]
        told = set(absent[MOST_ALIKE:])
        refuse_each("image", [self._no_image(image_id) for image_id in absent], problems)
        for image_id in (image_id for image_id in ids if image_id not in told):
            path = self.annotation_dir / f"{image_id}.xml"
            if path.name not in annotated and not os.path.isfile(path):
                problems.refuse("annotation", f"cannot read annotation {path}: it does not exist")
                continue
            annotation = read_annotation(path, problems)
            if annotation is not None:
                objects += annotation.listed
            if annotation is not None and image_id in image_of:
                found = self._record(image_id, image_of[image_id], annotation, path, problems)
                records.append(found)
        problems.listed(len(ids), objects)
        return records

    def image_files(self) -> dict[str, Path]:
        """Image id -> its file, of any extension; a .jpg wins over a .png of the same stem."""
        return {path.stem: path for path in sorted(self.image_dir.iterdir(), reverse=True)}

    def _no_image(self, image_id: str) -> str:
        text = (
            f"{self.image_dir / image_id}.jpg does not exist: {self.split_file} lists it, and there"
            f" is no image {image_id}.*"
        )
        bare = without_image_ending(image_id)
        return text if bare == image_id else f"{text}; write {bare} instead"

    def _record(
        self,
        image_id: str,
        image: Path,
        annotation: "VocAnnotation",
        path: Path,
        problems: Problems,
    ) -> Record:
        annotations = []
        for name, (xmin, ymin, xmax, ymax), difficult in annotation.objects:
            if name not in self.classes:
                text = f"{path}: class {shown(name)} is not one of VOC's 20 classes"
                problems.refuse("classes", text)
                continue
            if is_empty(xmin, ymin, xmax, ymax):
                continue
            annotations.append(
                {
                    "bbox": [xmin - 1, ymin - 1, xmax, ymax],
                    "category_id": self.classes.index(name),
                    "iscrowd": 0,
                    "difficult": difficult,
                }
            )
        height, width = annotation.size or image_size(image)
        return {
            "file_name": str(image),
            "image_id": image_id,
            "height": height,
            "width": width,
            "annotations": annotations,
        }


def _classes_in(annotation_dir: Path, problems: Problems) -> tuple[str, ...]:
    """Sorted names over all annotations, not one split's, so that train and test agree."""
    names = set()
    for path in annotation_dir.glob("[!.]*.xml"):  # macOS leaves a ._NAME.xml beside NAME.xml
        annotation = read_annotation(path, problems)
        if annotation is not None:
            names.update(name for name, _, _ in annotation.objects)
    if not names:
        problems.refuse("classes", f"{annotation_dir}/*.xml name no object")
    return tuple(sorted(names))


# -- split lists ----------------------------------------------------------------------------------

_IMAGE_ENDING = re.compile(r"\.(jpe?g|png|bmp|tiff?|webp)$", re.IGNORECASE)


def read_split(path: Path, problems: Problems, bare: bool = False) -> list[str]:
    """The first word of each line of a split list; one that comes twice or is no name is a problem.

    Args:
        bare: a word may be the path of an image, of which its name is taken.
    """
    ids = [line.split()[0] for line in read_lines(path) if line.strip()]
    ids = [without_image_ending(word) for word in ids] if bare else ids
    for word in (word for word in ids if len(word) > LONGEST_NAME):
        problems.refuse("list", f"{path} lists {shown(word)}: no file can have so long a name")
    ids = [word for word in ids if len(word) <= LONGEST_NAME]
    for image_id, times in Counter(ids).items():
        if times > 1:
            problems.refuse("list", f"{path} lists {image_id} {times} times: keep one of the lines")
    return list(dict.fromkeys(ids))


def read_lines(path: Path) -> list[str]:
    """The lines of a text in UTF-8, or in UTF-16 with its mark; UserError where it is neither."""
    data = read_regular(path)
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if marked else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not in UTF-8 ({error.reason})") from error
    if "\0" in text:
        raise UserError(f"cannot read {path}: it has a zero byte, which is no part of a list")
    return text.splitlines()


def without_image_ending(name: str) -> str:
    """The name without its folder and the ending of an image."""
    return _IMAGE_ENDING.sub("", name.rsplit("/", 1)[-1])


# -- XML ------------------------------------------------------------------------------------------

_MOST_XML = 2**24  # bytes; VOC's own have some thousands
_Object = tuple[str, tuple[float, ...], int]  # class, (xmin, ymin, xmax, ymax), difficult


@dataclass(frozen=True)
class VocAnnotation:
    """What a file says of its image: (height, width), where it does, and the objects.

    `listed`: how many objects it has; some may be unusable. `problems`: (whether it cannot be used,
    kind, text) of each thing that is wrong with it.
    """

    size: tuple[int, int] | None
    objects: tuple[_Object, ...]
    listed: int
    problems: tuple[tuple[bool, str, str], ...]


def read_annotation(path: Path, problems: Problems) -> VocAnnotation | None:
    """The content of an XML file; None, told to `problems`, where it is none."""
    try:
        state = path.stat()
        found = _annotation(path, (state.st_mtime_ns, state.st_size))
    except (OSError, ValueError, UserError) as error:
        problems.refuse("annotation", f"cannot read annotation {path}: {error}")
        return None
    for unusable, check, text in found.problems:
        (problems.refuse if unusable else problems.flaw)(check, text)
    return found


@functools.cache
def _annotation(path: Path, state: tuple[int, int]) -> VocAnnotation:
    """Kept for each state of a file: classes and records are both read from it."""
    root = _parse_xml(path)
    size = _size(root)
    nodes, objects, wrong = root.findall("object"), [], []
    for node in nodes:
        found = _object(node, size)
        if isinstance(found, str):
            wrong.append((True, "annotation", f"{path}: {found}"))
            continue
        objects.append(found)
        name, (xmin, ymin, xmax, ymax), _ = found
        if is_empty(xmin, ymin, xmax, ymax):
            corners = ", ".join(f"{corner:g}" for corner in found[1])
            text = f"{path}: {shown(name)} has a box of zero area, ({corners})"
            wrong.append((False, "area", text))
        elif size and (xmin > size[1] or ymin > size[0] or xmax < 1 or ymax < 1):
            corners = ", ".join(f"{corner:g}" for corner in found[1])
            text = f"{path}: {shown(name)} has a box outside of its image, ({corners})"
            wrong.append((False, "box", text))
    return VocAnnotation(size, tuple(objects), len(nodes), tuple(wrong))


def _parse_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file of any encoding that Python knows."""
    data = read_regular(path, _MOST_XML)
    try:
        return ElementTree.fromstring(_decoded(data))
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise UserError(f"{error}: it is no XML in the encoding that it states") from error


def _decoded(data: bytes) -> bytes | str:
    """As text where its declaration names an encoding that the parser may not know, as GB2312."""
    stated = re.match(rb"""\s*<\?xml[^>]*\sencoding=["']([\w.-]+)["'][^>]*\?>""", data)
    if not stated or stated[1].lower() in (b"utf-8", b"utf-16", b"us-ascii", b"iso-8859-1"):
        return data
    # GB2312 is how GBK, its superset, is often called.
    encoding = {"gb2312": "gb18030", "gbk": "gb18030"}.get(name := stated[1].decode().lower(), name)
    return data[stated.end() :].decode(encoding)


def _object(node: ElementTree.Element, size: tuple[int, int] | None) -> _Object | str:
    """One object, or what is wrong with it."""
    name = (node.findtext("name") or "").strip()
    corners = [node.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        box = tuple(float(corner) for corner in corners)
    except (TypeError, ValueError):
        box = ()
    if not name:
        return "an <object> lacks a <name>"
    if not box:
        return f"an <object> lacks the numbers of a <bndbox>: {shown(name)}"
    reach = REACH * max(size or (2**16,))
    if not all(-reach <= number <= reach for number in box):
        numbers = ", ".join(map(shown, corners))
        return (
            f"{shown(name)} has the box ({numbers}): it needs four finite numbers within {REACH} "
            "sides of the image"
        )
    difficult = (node.findtext("difficult") or "0").strip() or "0"
    if difficult not in ("0", "1"):
        return f"{shown(name)} has <difficult>{difficult[:40]}</difficult>, which is 0 or 1"
    return name, box, int(difficult)


def is_empty(xmin: float, ymin: float, xmax: float, ymax: float) -> bool:
    """Whether a box of inclusive pixels has no area; it is one pixel wide where xmax = xmin."""
    return xmax <= xmin - 1 or ymax <= ymin - 1


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """(height, width), or None where the annotation does not give them."""
    try:
        size = int(root.findtext("size/height")), int(root.findtext("size/width"))
    except (TypeError, ValueError):
        return None
    return size if min(size) > 0 else None
