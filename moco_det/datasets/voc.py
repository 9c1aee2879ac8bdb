"""PASCAL VOC's layout: XML annotations, split lists."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

from moco_det.common.errors import UserError
from moco_det.datasets.dataset import Dataset, Record, image_size, require

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)
# fmt: on

# name -> (folder, split)
_BUILTIN = {
    f"voc_{year}_{split}": (f"VOC{year}", split)
    for year in (2007, 2012)
    for split in ("train", "val", "trainval", "test")
}
NAMES = tuple(_BUILTIN)


@dataclass(frozen=True)
class VocDataset(Dataset):
    """PASCAL VOC layout. `eleven_point`: AP as in VOC 2007, not as the area under the curve."""

    evaluator: ClassVar[str] = "voc"
    root: Path
    split: str
    eleven_point: bool = False

    def records(self) -> list[Record]:
        """As in `Dataset`; an annotation also has "difficult", 0 or 1.

        As in Detectron2, the image id is the file's stem, difficult objects are kept, and the
        1-based inclusive pixels of the file become continuous by subtracting 1 from xmin and ymin.
        """
        # An image may have any extension. Reversed: a .jpg wins over a .png of the same stem.
        folder = sorted((self.root / "JPEGImages").iterdir(), reverse=True)
        image_of = {path.stem: path for path in folder}
        return [self._record(image_id, image_of) for image_id in self._image_ids()]

    def _image_ids(self) -> list[str]:
        lines = _split_file(self.root, self.split).read_text().splitlines()
        return [line.split()[0] for line in lines if line.strip()]

    def _record(self, image_id: str, image_of: dict[str, Path]) -> Record:
        if image_id not in image_of:
            raise UserError(f"dataset {self.name}: no image {image_id}.* in {self.root}/JPEGImages")
        path = self.root / "Annotations" / f"{image_id}.xml"
        tree = _parse_xml(path)
        annotations = []
        for name, (xmin, ymin, xmax, ymax), difficult in _voc_objects(tree, path):
            if name not in self.classes:
                known = ", ".join(self.classes)
                raise UserError(f"dataset {self.name}: {path}: class {name!r} is not in {known}")
            # In VOC's inclusive numbers this is one pixel wide; in practice, a slip of the hand.
            if xmax <= xmin or ymax <= ymin:
                continue
            annotations.append(
                {
                    "bbox": [xmin - 1, ymin - 1, xmax, ymax],
                    "category_id": self.classes.index(name),
                    "iscrowd": 0,
                    "difficult": difficult,
                }
            )
        height, width = _voc_size(tree) or image_size(image_of[image_id])
        return {
            "file_name": str(image_of[image_id]),
            "image_id": image_id,
            "height": height,
            "width": width,
            "annotations": annotations,
        }


def builtin(name: str, root: Path) -> VocDataset:
    """The data set of `NAMES`, below the folder `root`."""
    folder, split = _BUILTIN[name]
    _require_parts(name, root / folder, split, holder=root)
    return VocDataset(name, VOC_CLASSES, root / folder, split, folder == "VOC2007")


def own(name: str, folder: Path, split: str) -> VocDataset:
    """The split of a folder with this layout, called `name`."""
    _require_parts(name, folder, split)
    return VocDataset(name, _classes_in(folder), folder, split)


def _split_file(root: Path, split: str) -> Path:
    return root / "ImageSets" / "Main" / f"{split}.txt"


def _require_parts(name: str, root: Path, split: str, holder: Path | None = None) -> None:
    for path in (root / "JPEGImages", root / "Annotations", _split_file(root, split)):
        require(name, path, holder)


def _classes_in(root: Path) -> tuple[str, ...]:
    """Sorted names over all annotations, not one split's, so that train and test agree."""
    names = set()
    for path in (root / "Annotations").glob("*.xml"):
        names.update(name for name, _, _ in _voc_objects(_parse_xml(path), path))
    if not names:
        raise UserError(f"{root}/Annotations/*.xml name no object")
    return tuple(sorted(names))


def _parse_xml(path: Path) -> ElementTree.ElementTree:
    try:
        return ElementTree.parse(path)
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"cannot read annotation {path}: {error}") from error


def _voc_objects(
    tree: ElementTree.ElementTree, path: Path
) -> list[tuple[str, tuple[float, ...], int]]:
    """(class, (xmin, ymin, xmax, ymax) as in the file, difficult) of each object."""
    objects = []
    try:
        for node in tree.findall("object"):
            box = node.find("bndbox")
            corners = tuple(float(box.find(k).text) for k in ("xmin", "ymin", "xmax", "ymax"))
            difficult = int(node.findtext("difficult") or 0)
            objects.append((node.find("name").text.strip(), corners, difficult))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: an <object> lacks a <name> or the numbers of a <bndbox>"
        ) from error
    return objects


def _voc_size(tree: ElementTree.ElementTree) -> tuple[int, int] | None:
    """(height, width), or None where the annotation does not give them."""
    try:
        size = int(tree.findtext("size/height")), int(tree.findtext("size/width"))
    except (TypeError, ValueError):
        return None
    return size if min(size) > 0 else None
