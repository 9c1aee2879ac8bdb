"""Which colour a class or an object is drawn in, and where its label is written."""

import colorsys
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from moco_det.common.images import label_colour

Colour = tuple[int, int, int]

GOLDEN_ANGLE = 0.381966  # of the colour circle: neighbours in number are far apart in colour
LEAST_DIFFERENCE = 120  # of two colours, summed over the channels, that touch each other

# As cityscapesscripts draws them.
CITYSCAPES = {
    "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70),
    "wall": (102, 102, 156), "fence": (190, 153, 153), "pole": (153, 153, 153),
    "traffic light": (250, 170, 30), "traffic sign": (220, 220, 0), "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152), "sky": (70, 130, 180), "person": (220, 20, 60),
    "rider": (255, 0, 0), "car": (0, 0, 142), "truck": (0, 0, 70), "bus": (0, 60, 100),
    "train": (0, 80, 100), "motorcycle": (0, 0, 230), "bicycle": (119, 11, 32),
}  # fmt: skip


def colour(index: int) -> Colour:
    """A bright colour, another one for each index."""
    hue = index * GOLDEN_ANGLE % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.65 + 0.35 * (index % 2), 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def palette(classes: Sequence[str]) -> list[Colour]:
    """A colour for each class: Cityscapes' and VOC's own for their label maps, else bright ones."""
    if len(classes) >= 8 and set(classes) <= CITYSCAPES.keys():  # of instances there are 8
        return [CITYSCAPES[name] for name in classes]
    if len(classes) == 21 and classes[0] == "background":
        return [label_colour(index) for index in range(21)]
    return [colour(index) for index in range(len(classes))]


def family(shade: Colour) -> list[Colour]:
    """Colours that are seen to be kin to one: lighter, darker, and a little beside it in hue."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in shade))
    kin = [
        ((hue + turn) % 1, saturation * s, value * v)
        for turn in (0, 0.05)
        for s, v in ((1, 1), (0.35, 1), (1, 0.6), (0.4, 0.65), (1, 0.3))
    ]
    return [tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(*hsv)) for hsv in kin]


def distinct(boxes: Tensor, shades: Sequence[Colour]) -> list[Colour]:
    """A colour for each of N objects, kin to its class's; those whose boxes touch differ clearly.

    Where a crowd leaves no such colour, it is the one that differs most.

    Args:
        boxes: N x 4, XYXY.
        shades: the N colours of their classes.
    """
    corners, taken = boxes.numpy(), np.zeros((len(boxes), 3), int)
    families = {shade: np.array(family(shade)) for shade in set(shades)}
    for number, shade in enumerate(shades):
        candidates = families[shade]
        near = taken[:number][_touching(corners[number], corners[:number])]
        differences = np.abs(candidates[:, None] - near[None]).sum(axis=2)
        gaps = differences.min(axis=1, initial=LEAST_DIFFERENCE)  # more than that is no better
        taken[number] = candidates[gaps.argmax()]  # the first of the best
    return [tuple(shade) for shade in taken.tolist()]


def ink(shade: Colour) -> Colour:
    """Black or white, whichever is read more easily on the colour (Rec. 601's luma)."""
    luma = sum(
        weight * channel for weight, channel in zip((0.299, 0.587, 0.114), shade, strict=True)
    )
    return (0, 0, 0) if luma > 110 else (255, 255, 255)


def _touching(box: np.ndarray, boxes: np.ndarray, gap: float = 2) -> np.ndarray:
    """Which of N boxes overlap a box, or lie within `gap` pixels of it."""
    before = (box[:2] - gap <= boxes[:, 2:]).all(axis=1)
    return before & (boxes[:, :2] - gap <= box[2:]).all(axis=1)


# -- labels ---------------------------------------------------------------------------------------

HIDDEN = 0.25  # of an object, at most, may lie under labels
MOST = 300  # labels; a picture has no room for more

Plate = tuple[float, float, float, float]  # x0, y0, x1, y1


class Labels:
    """Where the labels of a picture's objects are written: above their boxes, or where they hide
    least.

    Args:
        boxes: of all objects, N x 4, XYXY.
        picture: its width and height.
    """

    def __init__(self, boxes: np.ndarray, picture: tuple[int, int]):
        self.boxes = boxes
        self.picture = picture
        self.plates = np.zeros((0, 4))  # of the labels so far
        self.asked = 0
        self.hidden = np.zeros(len(boxes))  # the share of each object that lies under them

    def place(self, size: tuple[float, float], corners: Sequence[float]) -> Plate | None:
        """The plate of one more label; None where it would hide an object wherever it is, and of
        objects after the first `MOST`.

        Of the places on and around its box that hide no object it is the first that touches no
        other label, or else the one that covers least of another.

        Args:
            size: width and height of the label.
            corners: of the object's box, XYXY.
        """
        self.asked += 1
        if self.asked > MOST:
            return None
        (width, height), (x0, y0, x1, y1) = size, corners
        places = [
            (x0, y0 - height), (x0, y1), (x1 - width, y0 - height), (x1 - width, y1),
            (x1, y0), (x0 - width, y0), (x0, y0), (x0, y1 - height),
        ]  # fmt: skip
        best, least = None, np.inf
        for x, y in places:
            x = min(max(x, 0), max(self.picture[0] - width, 0))
            y = min(max(y, 0), max(self.picture[1] - height, 0))
            plate = (x, y, x + width, y + height)
            more = _covered(plate, self.boxes)
            if (self.hidden + more)[more > 0].max(initial=0) > HIDDEN:
                continue
            overlap = _covered(plate, self.plates).max(initial=0)
            if overlap < least:
                best, least = plate, overlap
            if overlap == 0:
                break
        if best:
            self.hidden += _covered(best, self.boxes)
            self.plates = np.concatenate([self.plates, [best]])
        return best


def _covered(plate: Plate, boxes: np.ndarray) -> np.ndarray:
    """The share of each of N boxes that lies under the plate."""
    over = np.minimum(boxes[:, 2:], plate[2:]) - np.maximum(boxes[:, :2], plate[:2])
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(min=1e-6).prod(axis=1)
    return over.clip(min=0).prod(axis=1) / areas
