"""How far crops overlap, as numbers and as pictures: Figures 1 and 4 of arXiv:2106.05967."""

from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from pretrain.data.crops import Window, draw_crop, iou, share_within
from pretrain.data.multi_crop import KEY, QUERY, MultiCrop

BINS = 25
SIZE = 720, 440  # of a histogram, in pixels
MARGINS = 70, 40, 20, 50  # left, top, right, bottom: what is around its bars
BARS, KEYS, VALID, INVALID = (0, 114, 178), (255, 255, 255), (0, 190, 110), (230, 60, 20)  # RGB
LONGEST = 900  # side of a picture of crops


def pair_ious(sizes: np.ndarray, crops: MultiCrop, pairs: int, seed: int) -> tuple[np.ndarray, int]:
    """IoUs of the query's and the key's crop of so many images, and how many of them are outside
    the limits of `crops`, since the draws ran out.

    Args:
        sizes: height and width of images, M x 2, of which those of each pair are drawn.
    """
    rng = np.random.default_rng(seed)
    ious, outside = np.empty(pairs), 0
    for number, image in enumerate(rng.integers(len(sizes), size=pairs)):
        views, free = crops.draw(*sizes[image].tolist(), rng)
        outside += free[KEY]
        ious[number] = iou(views[QUERY].window, views[KEY].window)
    return ious, outside


def draw_histogram(ious: np.ndarray, title: str) -> Image.Image:
    """The share of pairs in each of BINS equal intervals of [0, 1]."""
    shares = np.histogram(ious, BINS, (0.0, 1.0))[0] / len(ious)
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.25) if 5 * s >= shares.max() or s == 0.25)
    top = step * np.ceil(shares.max() / step)  # of the axis
    left, above, right, below = MARGINS
    width, height = SIZE[0] - left - right, SIZE[1] - above - below
    base = above + height
    picture = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((left, 12), title, fill="black", font_size=15)
    for tick in range(round(top / step) + 1):
        y = base - height * tick * step / top
        draw.line((left, y, left + width, y), fill=(220, 220, 220))
        draw.text((left - 8, y), f"{tick * step:.0%}", fill="black", font_size=13, anchor="rm")
    for number, share in enumerate(shares):
        x = left + width * number / BINS, left + width * (number + 1) / BINS
        draw.rectangle((x[0] + 1, base - height * share / top, x[1] - 1, base), fill=BARS)
    for tick in range(6):
        x = left + width * tick / 5
        draw.text((x, base + 6), f"{tick / 5:.1f}", fill="black", font_size=13, anchor="ma")
    said = "IoU of two crops of an image", "pairs"
    draw.text((left + width / 2, SIZE[1] - 8), said[0], fill="black", font_size=14, anchor="mb")
    draw.text((12, above - 8), said[1], fill="black", font_size=14, anchor="lb")
    return picture


def draw_small_crops(
    height: int,
    width: int,
    rng: np.random.Generator,
    crop_min: float,
    small_scale: tuple[float, float],
    share: float,
    count: int,
) -> tuple[Window, list[Window], list[bool]]:
    """A key's crop, `count` small ones anywhere, and which of these are valid: of their area at
    least `share` is in the key's crop.

    Args:
        crop_min: least area of the key's crop.
        small_scale: limits of the area of small ones.
    """
    key = draw_crop(height, width, rng, crop_min)
    windows = [draw_crop(height, width, rng, *small_scale) for _ in range(count)]
    return key, windows, [bool(share_within(window, key) >= share) for window in windows]


def draw_crops(
    image: np.ndarray, key: Window, windows: Iterable[Window], valid: Iterable[bool]
) -> Image.Image:
    """The image (H, W, 3), around which is darker than in the key's crop; frames of small crops,
    green where they are valid and red where not."""
    picture = Image.fromarray(image // 2 + 30)
    top, left, height, width = key
    picture.paste(Image.fromarray(image[top : top + height, left : left + width]), (left, top))
    scale = min(1.0, LONGEST / max(picture.size))
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size])
    draw = ImageDraw.Draw(picture)
    frames = [
        (key, KEYS),
        *((w, VALID if v else INVALID) for w, v in zip(windows, valid, strict=True)),
    ]
    for (top, left, height, width), colour in frames:
        corners = left, top, left + width - 1, top + height - 1
        draw.rectangle([side * scale for side in corners], outline=colour, width=3)
    return picture
