"""Pictures of label maps: painted on the images that they belong to, in rows with captions."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moco_det.common.errors import one_line
from moco_det.common.images import label_colour

HEIGHT = 160  # of a tile, in pixels
CAPTION = 18  # pixels below it
GAP = 4
SHARE = 0.6  # of a label's colour where it is painted

# Of label images, but brighter: their strongest channel is 192.
COLOURS = np.array([label_colour(number) for number in range(256)])
COLOURS = (COLOURS * (255 / 192)).clip(max=255).astype(np.uint8)


def painted(
    pixels: np.ndarray, labels: np.ndarray, outlined: np.ndarray | None = None
) -> np.ndarray:
    """A tile, HEIGHT pixels high: an image with its labels above 0 in their colours.

    Args:
        pixels: H x W x 3, uint8.
        labels: H x W, uint8.
        outlined: another label map, whose regions get a white outline.
    """
    tile = shrunk(pixels)
    size = tile.shape[1::-1]
    labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    mixed = (1 - SHARE) * tile + SHARE * COLOURS[labels]
    tile = np.where((labels > 0)[..., None], mixed, tile).astype(np.uint8)
    if outlined is not None:
        outlined = cv2.resize(outlined, size, interpolation=cv2.INTER_NEAREST)
        tile[_edges(outlined)] = 255
    return tile


def highlighted(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A tile whose pixels outside the mask, bool H x W, are dark and grey."""
    tile = shrunk(pixels)
    mask = cv2.resize(mask.astype(np.uint8), tile.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    grey = 0.35 * tile.mean(axis=2, keepdims=True)
    shown = np.where((mask > 0)[..., None], tile, grey).astype(np.uint8)
    shown[_edges(mask)] = (255, 210, 0)
    return shown


def shrunk(pixels: np.ndarray) -> np.ndarray:
    """An image HEIGHT pixels high."""
    width = max(1, round(HEIGHT * pixels.shape[1] / pixels.shape[0]))
    return cv2.resize(pixels, (width, HEIGHT), interpolation=cv2.INTER_AREA)


def _edges(labels: np.ndarray) -> np.ndarray:
    """Bool H x W: the outermost pixels of each region above 0."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inner = (cv2.erode(labels, cross) == labels) & (cv2.dilate(labels, cross) == labels)
    return (labels > 0) & ~inner


def captioned_row(tiles: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Tiles side by side, each with a line below it; what does not fit is cut off."""
    width = sum(tile.shape[1] for tile in tiles) + GAP * (len(tiles) - 1)
    row = Image.new("RGB", (width, HEIGHT + CAPTION), "white")
    draw, font, left = ImageDraw.Draw(row), ImageFont.load_default(11), 0
    for tile, caption in zip(tiles, captions, strict=True):
        row.paste(Image.fromarray(tile), (left, 0))
        text = one_line(caption)
        while text and font.getlength(text) > tile.shape[1] - 2:
            text = text[:-1]
        draw.text((left + 1, HEIGHT + 1), text, fill="black", font=font)
        left += tile.shape[1] + GAP
    return np.array(row)


def stacked(rows: Sequence[np.ndarray]) -> Image.Image:
    """Rows one above the other, as wide as the widest."""
    sheet = Image.new(
        "RGB", (max(r.shape[1] for r in rows), sum(r.shape[0] for r in rows)), "white"
    )
    top = 0
    for row in rows:
        sheet.paste(Image.fromarray(row), (0, top))
        top += row.shape[0]
    return sheet
