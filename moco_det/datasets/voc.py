"""PASCAL VOC's layout: XML annotations, split lists."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

from moco_det.common.errors import UserError
from moco_det.common.images import image_size
from moco_det.datasets.dataset import Dataset, Record, require

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
        cls, name: str, first: Path, second: str, data_root: Path | None = None
    ) -> "VocDataset":
        dataset = cls(name, VOC_CLASSES, first, second, name.startswith("voc_2007_"))
        require(name, dataset.required, data_root)
        own = data_root is None
        return replace(dataset, classes=_classes_in(dataset.annotation_dir)) if own else dataset

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

    def records(self) -> list[Record]:
        """As in `Dataset`; an annotation also has "difficult", 0 or 1.

        As in Detectron2, the image id is the file's stem, difficult objects are kept, and the
        1-based inclusive pixels of the file become continuous by subtracting 1 from xmin and ymin.
        """
        image_of = self.image_files()
        return [self._record(image_id, image_of) for image_id in self.image_ids()]

    def image_files(self) -> dict[str, Path]:
        """Image id -> its file, of any extension; a .jpg wins over a .png of the same stem."""
        return {path.stem: path for path in sorted(self.image_dir.iterdir(), reverse=True)}

    def image_ids(self) -> list[str]:
        """Those of the split file, the first word of each line."""
        lines = self.split_file.read_text().splitlines()
        return [line.split()[0] for line in lines if line.strip()]

    def _record(self, image_id: str, image_of: dict[str, Path]) -> Record:
        if image_id not in image_of:
            raise UserError(f"dataset {self.name}: no image {image_id}.* in {self.image_dir}")
        path = self.annotation_dir / f"{image_id}.xml"
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
        height, width = voc_size(tree) or image_size(image_of[image_id])
        return {
            "file_name": str(image_of[image_id]),
            "image_id": image_id,
            "height": height,
            "width": width,
            "annotations": annotations,
        }


def _classes_in(annotation_dir: Path) -> tuple[str, ...]:
    """Sorted names over all annotations, not one split's, so that train and test agree."""
    names = set()
    for path in annotation_dir.glob("*.xml"):
        names.update(name for name, _, _ in _voc_objects(_parse_xml(path), path))
    if not names:
        raise UserError(f"{annotation_dir}/*.xml name no object")
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


def voc_size(tree: ElementTree.ElementTree) -> tuple[int, int] | None:
    """(height, width), or None where the annotation does not give them."""
    try:
        size = int(tree.findtext("size/height")), int(tree.findtext("size/width"))
    except (TypeError, ValueError):
        return None
    return size if min(size) > 0 else None
