"""Which colour a class or an object is drawn in, and where its label is written."""

import colorsys
from collections.abc import Sequence

import numpy as np
from torch import Tensor

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
        return [_voc(index) for index in range(21)]
    return [colour(index) for index in range(len(classes))]


def _voc(index: int) -> Colour:
    """The colour map of VOC's label images: the bits of the index, dealt to R, G and B in turn."""
    bits = [[index >> (3 * level + channel) & 1 for level in range(3)] for channel in range(3)]
    return tuple(sum(bit << (7 - level) for level, bit in enumerate(row)) for row in bits)


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
    boxes, taken = boxes.tolist(), []
    for box, shade in zip(boxes, shades, strict=True):
        near = [other for at, other in zip(boxes, taken, strict=False) if _touch(box, at)]
        candidates = family(shade)
        gaps = [min((_difference(c, n) for n in near), default=np.inf) for c in candidates]
        free = [c for c, gap in zip(candidates, gaps, strict=True) if gap >= LEAST_DIFFERENCE]
        taken.append(free[0] if free else candidates[int(np.argmax(gaps))])
    return taken


def ink(shade: Colour) -> Colour:
    """Black or white, whichever is read more easily on the colour (Rec. 601's luma)."""
    luma = sum(
        weight * channel for weight, channel in zip((0.299, 0.587, 0.114), shade, strict=True)
    )
    return (0, 0, 0) if luma > 110 else (255, 255, 255)


def _difference(one: Colour, other: Colour) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def _touch(one: Sequence[float], other: Sequence[float], gap: float = 2) -> bool:
    """Whether two boxes overlap, or lie within `gap` pixels of each other."""
    return all(one[i] - gap <= other[i + 2] and other[i] - gap <= one[i + 2] for i in (0, 1))


# -- labels ---------------------------------------------------------------------------------------

HIDDEN = 0.25  # of an object, at most, may lie under labels

Plate = tuple[float, float, float, float]  # x0, y0, x1, y1


def place_label(
    size: tuple[float, float],
    corners: Sequence[float],
    boxes: np.ndarray,
    plates: Sequence[Plate],
    picture: tuple[int, int],
) -> Plate | None:
    """Where the label of an object is written: above its box, or where it hides least.

    Args:
        size: width and height of the label.
        corners: of the object's box, XYXY.
        boxes: of all objects of the picture, N x 4.
        plates: of the labels that are written already.
        picture: its width and height.

    Returns:
        The first place, of those on and around the box, that hides no object and no other label;
        then one that hides no object; None where there is neither.
    """
    (width, height), (x0, y0, x1, y1) = size, corners
    places = [
        (x0, y0 - height), (x0, y1), (x1 - width, y0 - height), (x1 - width, y1),
        (x1, y0), (x0 - width, y0), (x0, y0), (x0, y1 - height),
    ]  # fmt: skip
    hidden = sum((_covered(plate, boxes) for plate in plates), np.zeros(len(boxes)))
    possible = []
    for x, y in places:
        x = min(max(x, 0), max(picture[0] - width, 0))
        y = min(max(y, 0), max(picture[1] - height, 0))
        plate = (x, y, x + width, y + height)
        more = _covered(plate, boxes)
        if (hidden + more)[more > 0].max(initial=0) <= HIDDEN:
            overlap = _covered(plate, np.array(plates)).max() if plates else 0
            possible.append((overlap, plate))
    return min(possible, key=lambda found: found[0])[1] if possible else None


def _covered(plate: Plate, boxes: np.ndarray) -> np.ndarray:
    """The share of each of N boxes that lies under the plate."""
    over = np.minimum(boxes[:, 2:], plate[2:]) - np.maximum(boxes[:, :2], plate[:2])
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(min=1e-6).prod(axis=1)
    return over.clip(min=0).prod(axis=1) / areas
