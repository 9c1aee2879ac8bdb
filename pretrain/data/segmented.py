"""PASCAL VOC's segmentation split: images with a class for each pixel.

DATA/ImageSets/Segmentation/SPLIT.txt       an image's id in each line; also in DATA/VOC2012 or
                                            DATA/VOCdevkit/VOC2012
DATA/JPEGImages/ID.jpg
DATA/SegmentationClass/ID.png               0 background, 1 to 20, 255 void
DATA/SegmentationClassAug/ID.png            the same for a SPLIT whose name ends in "aug"
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from moco_det.common.errors import UserError, one_line
from moco_det.common.images import read_image, read_label_map
from pretrain.data.listing import read_lines

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
VOID = 255
PLACES = ("", "VOC2012", "VOCdevkit/VOC2012")  # of ImageSets/ and JPEGImages/ in DATA
SOURCE = (
    "download VOCtrainval_11-May-2012.tar from PASCAL VOC 2012 (host.robots.ox.ac.uk); DATA is its "
    "folder VOC2012"
)


@dataclass(frozen=True)
class SegmentedImage:
    """An image and its label map."""

    name: str
    image: Path
    labels: Path

    def read(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels S x S x 3 and labels S x S, uint8, the sides of both stretched to `size`.

        Raises:
            UserError: a file cannot be read, or the labels are no classes or of another size.
        """
        pixels, (mode, labels) = read_image(self.image), read_label_map(self.labels)
        if mode not in ("P", "L"):
            raise UserError(
                f"label map {self.labels} is of Pillow's mode {mode}: it needs one channel of 8 "
                "bits (mode P or L) that holds the classes themselves, not colours"
            )
        if labels.shape != pixels.shape[:2]:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (labels.shape, pixels.shape)]
            raise UserError(
                f"label map {self.labels} is {sizes[0]} pixels, its image {self.image} {sizes[1]}"
            )
        unknown = labels[(labels >= len(CLASSES)) & (labels != VOID)]
        if unknown.size:
            raise UserError(
                f"label map {self.labels} holds the label {unknown[0]}: VOC has 0 to "
                f"{len(CLASSES) - 1}, and {VOID} for void"
            )
        side = (size, size)
        pixels = cv2.resize(pixels, side, interpolation=cv2.INTER_CUBIC)
        return pixels, cv2.resize(labels, side, interpolation=cv2.INTER_NEAREST)


def find_segmented(data: Path, split: str) -> list[SegmentedImage]:
    """The images of a split, in the list's order.

    Args:
        data: the folder that has ImageSets/ and JPEGImages/, or one of PLACES below it.

    Raises:
        UserError: the list, or a file that it calls for, is missing.
    """
    roots = [data / place for place in PLACES]
    root = next((r for r in roots if (r / "ImageSets" / "Segmentation").is_dir()), data)
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not path.is_file():
        raise UserError(f"no list {path}: {SOURCE}")
    labels = root / ("SegmentationClassAug" if split.endswith("aug") else "SegmentationClass")
    lines = read_lines(path)
    # Some lists of train_aug have two paths in a line instead of an id.
    names = [Path(line.split()[0]).stem if "/" in line else line for line in lines]
    if not names:
        raise UserError(f"{path} lists no image: {SOURCE}")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:  # its segments would count as often
        raise UserError(f"{path} lists {one_line(name, 60)} {times} times: keep one of the lines")
    found = [
        SegmentedImage(name, root / "JPEGImages" / f"{name}.jpg", labels / f"{name}.png")
        for name in names
    ]
    for image in found:
        for file in (image.image, image.labels):
            if not file.is_file():
                name = one_line(image.name, 60)
                raise UserError(f"{path} lists {name}, but there is no {file}: {SOURCE}")
    return found
