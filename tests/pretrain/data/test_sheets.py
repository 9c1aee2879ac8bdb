"""Contact sheets, tile by tile."""

import numpy as np
import torch

from pretrain.data.sheets import CAPTION, TILE, draw_sheet, draw_views, ending


def test_tiles_stand_in_their_rows_with_captions_below():
    red, blue = (np.full((TILE, TILE, 3), colour, np.uint8) for colour in ((9, 0, 0), (0, 0, 9)))
    small = np.zeros((2, 2, 3), np.uint8)
    small[0, 0] = 7
    pixels = np.asarray(draw_sheet([[(red, "a"), (blue, "")], [(small, "")]]))
    assert pixels.shape == (2 * (TILE + CAPTION), 2 * TILE, 3)
    assert (pixels[:TILE, :TILE] == red).all()
    assert (pixels[:TILE, TILE:] == blue).all()
    assert (pixels[TILE : TILE + CAPTION, :TILE] < 128).any()  # the letter
    assert (pixels[TILE : TILE + CAPTION, TILE:] == 255).all()
    lower = pixels[TILE + CAPTION :][:TILE]
    assert (lower[: TILE // 2, : TILE // 2] == 7).all()  # enlarged without values in between
    assert (lower[TILE // 2 :, :TILE] == 0).all()
    assert (lower[:, TILE:] == 255).all()


def test_views_of_any_number_and_size():
    views = [torch.full((3, side, side, 3), shade, dtype=torch.uint8)
             for side, shade in ((120, 1), (120, 2), (40, 3), (40, 4))]  # fmt: skip
    pixels = draw_views(views)
    assert pixels.shape == (3 * (120 + CAPTION), 4 * 120, 3)
    assert pixels[60, 60::120, 0].tolist() == [1, 2, 3, 4]
    assert draw_views(views[:1]).shape == (3 * (120 + CAPTION), 120, 3)


def test_a_long_name_keeps_its_end():
    assert ending("a/b.png") == "a/b.png"
    assert ending("folder/of/one/class/0001.png") == "...ne/class/0001.png"
