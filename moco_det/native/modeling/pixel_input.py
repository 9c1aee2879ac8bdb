"""What the mappers of both engines do to the images and maps of models that predict pixels.

Pure functions. Sizes are (height, width). A map has a value for each pixel of its image: labels are
uint8 (H, W), depths float32 (H, W) in metres, 0 where none was measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moco_det.native.modeling.boxes import Size

# -- sizes ----------------------------------------------------------------------------------------


def scaled_size(height: int, width: int, factor: float) -> Size:
    """Both sides times `factor`, rounded half up, at least 1."""
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def covering_size(height: int, width: int, factor: float, window: Sequence[int]) -> Size:
    """`scaled_size`, or where the `window` would not fit in that, by the least factor that it does.

    Args:
        window: (height, width), or () for none.
    """
    least = max((w / side for w, side in zip(window, (height, width), strict=False)), default=0.0)
    return scaled_size(height, width, max(factor, least))


def pad(x: Tensor, size: Sequence[int], value: Tensor | float) -> Tensor:
    """(..., h, w) -> (..., *size), filled with `value` below and on the right.

    Images are filled with the mean pixel, which is 0 after normalisation, and label maps with the
    ignored label. A tensor as value, (3, 1, 1), gives its dtype to the result. `x` itself, where
    there is nothing to fill.
    """
    height, width = x.shape[-2:]
    if (height, width) == tuple(size):
        return x
    dtype = value.dtype if isinstance(value, Tensor) else x.dtype
    padded = torch.empty((*x.shape[:-2], *size), dtype=dtype)
    padded[...] = value
    padded[..., :height, :width] = x
    return padded


# -- a frame of fixed size ------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """An image of size `old` in a frame of size `new`, zoomed and turned about its middle.

    The image is stretched to the frame; then, as if it were not stretched, enlarged by `zoom` and
    turned by `angle` degrees against the clock. What no longer fits is lost, and what becomes empty
    is filled. Without zoom and angle only the stretching is left, which is that of `Transform`.
    """

    old: Size
    new: Size
    zoom: float = 1.0
    angle: float = 0.0

    def image(self, image: Image.Image, fill: Sequence[int]) -> Image.Image:
        """Bilinear; `fill`: a pixel."""
        if self.new != self.old:
            image = image.resize(self.new[::-1], Image.Resampling.BILINEAR)
        return self._move(image, Image.Resampling.BILINEAR, tuple(fill))

    def labels(self, labels: np.ndarray, ignored: int) -> np.ndarray:
        """By the nearest pixel, so that no label comes about that was none."""
        return self._nearest(labels, ignored)

    def depths(self, depths: np.ndarray) -> np.ndarray:
        """By the nearest pixel; what is enlarged is so much nearer."""
        return self._nearest(depths, 0) / np.float32(self.zoom)

    def _nearest(self, values: np.ndarray, fill: int) -> np.ndarray:
        image = Image.fromarray(values)
        if self.new != self.old:
            image = image.resize(self.new[::-1], Image.Resampling.NEAREST)
        return np.array(self._move(image, Image.Resampling.NEAREST, fill))

    def _move(self, image: Image.Image, method: Image.Resampling, fill) -> Image.Image:
        if (self.zoom, self.angle) == (1.0, 0.0):
            return image
        affine = Image.Transform.AFFINE
        return image.transform(image.size, affine, self.coefficients(), method, fillcolor=fill)

    def coefficients(self) -> tuple[float, ...]:
        """(a, b, c, d, e, f) by which a place (x, y) of the result is that of the stretched image:

        x' = a x + b y + c, y' = d x + e y + f, in continuous pixel coordinates, as Pillow has them.
        """
        height, width = self.new
        down, right = height / self.old[0], width / self.old[1]
        radians = math.radians(self.angle)
        cos, sin = math.cos(radians) / self.zoom, math.sin(radians) / self.zoom
        # y points down, so that against the clock is from y to x.
        a, b, d, e = cos, -sin * right / down, sin * down / right, cos
        x, y = width / 2, height / 2  # the middle stays where it is
        return a, b, x - a * x - b * y, d, e, y - d * x - e * y
