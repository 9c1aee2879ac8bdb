"""Contact sheets: rows of images with a caption below each."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from moco_det.common.errors import one_line

TILE = 112  # pixels of an image of a sheet
CAPTION = 28  # pixels below it

Tile = tuple[np.ndarray, str]  # uint8 RGB, h x w x 3, and its caption of one or two lines


def draw_sheet(rows: Sequence[Sequence[Tile]], tile: int = TILE) -> Image.Image:
    """All tiles in a grid, one row below the other; those of another size are resized to `tile`."""
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * tile, len(rows) * (tile + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (pixels, caption) in enumerate(row):
            left, top = x * tile, y * (tile + CAPTION)
            picture = Image.fromarray(pixels)
            if picture.size != (tile, tile):
                picture = picture.resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top))
            draw.text((left + 2, top + tile), caption, fill="black", font_size=9)
    return sheet


def draw_views(views: Sequence[torch.Tensor]) -> np.ndarray:
    """A row for each image: its views, as the encoders see them but for their size.

    Args:
        views: of the same N images, uint8 RGB, N x S x S x 3 each: the query's, the key's and,
            under multi-crop, small ones. A mechanism whose keys are stored has the query's only.
    """
    names = ["query", "key"] + [f"small {number}" for number in range(1, len(views) - 1)]
    of_image = zip(*(view.cpu().numpy() for view in views), strict=True)
    rows = [list(zip(row, names, strict=False)) for row in of_image]
    return np.asarray(draw_sheet(rows, max(TILE, views[0].shape[1])))


def ending(name: str, most: int = 20) -> str:
    """The end of a name, where images of one folder differ."""
    name = one_line(name, 200)
    return name if len(name) <= most else f"...{name[3 - most :]}"
