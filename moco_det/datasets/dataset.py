"""What a data set is: a name, classes, and Detectron2's standard records."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, UnidentifiedImageError

from moco_det.common.errors import UserError

Record = dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """A named set of annotated images.

    `classes[i]` is the name of contiguous category `i`; `evaluator` says whose metric applies;
    `keypoint_names` are those of every object, where the annotations have keypoints.
    """

    evaluator: ClassVar[str]
    name: str
    classes: tuple[str, ...]
    keypoint_names: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def keypoint_flips(self) -> tuple[tuple[str, str], ...]:
        """The keypoints that trade places in a mirrored image, told by COCO's left_ and right_."""
        pairs = ((name, name.replace("left_", "right_", 1)) for name in self.keypoint_names)
        return tuple((a, b) for a, b in pairs if a != b and b in self.keypoint_names)

    def records(self) -> list[Record]:
        """One dict per image, always in the same order.

        {"file_name", "image_id", "height", "width", "annotations": [{"bbox": [x0, y0, x1, y1] in
        continuous pixel coordinates, "category_id": contiguous, "iscrowd": 0 or 1}]}. Boxes without
        area are left out. Raises `UserError` for a missing or malformed file.
        """
        raise NotImplementedError


def require(name: str, path: Path, holder: Path | None) -> None:
    """Check that `path` exists. `holder`: the root of the built-in data sets, for the message."""
    if path.exists():
        return
    message = f"dataset {name}: expected {path}, which does not exist"
    if holder is not None:
        message += f"; set DETECTRON2_DATASETS to the folder that is to hold it, now {holder}"
    raise UserError(message)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header of an image."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"cannot read image {path}: {error}") from error
