"""What `native.modeling.pixel_input` does to images and maps, as Detectron2's augmentations."""

from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T
from PIL import Image

from moco_det.datasets.semantic import IGNORED
from moco_det.native.modeling.pixel_input import Frame, covering_size, scaled_size


class RandomScale(T.Augmentation):
    """Resizes an image to its own size times a factor.

    Args:
        smallest, largest: between which the factor is drawn uniformly.
    """

    def __init__(self, smallest: float, largest: float):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        factor = self._rand_range(self.smallest, self.largest)
        new = scaled_size(height, width, factor)
        return T.ResizeTransform(height, width, *new, Image.BILINEAR)


class ScaleChoice(T.Augmentation):
    """Resizes an image to its own size times one of `factors`, or as large as covers `window`.

    Args:
        factors: of which one is drawn, each as often as the others.
        window: (height, width); () for none.
    """

    def __init__(self, factors: Sequence[float], window: Sequence[int] = ()):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        new = covering_size(height, width, float(np.random.choice(self.factors)), self.window)
        return T.ResizeTransform(height, width, *new, Image.BILINEAR)


class RandomFrame(T.Augmentation):
    """Brings an image into a frame of fixed size, with a zoom and a turn: see `Frame`.

    Args:
        size: (height, width) of the frame.
        fill: the pixel of what becomes empty, in the image's order of channels.
        scale: (smallest, largest) zoom, drawn uniformly; () for none.
        choices: zooms of which one is drawn, in the place of `scale`; () for none.
        rotation: the largest angle in degrees, to either side, drawn uniformly.
    """

    def __init__(
        self,
        size: Sequence[int],
        fill: Sequence[int],
        scale: Sequence[float] = (),
        choices: Sequence[float] = (),
        rotation: float = 0.0,
    ):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> "FrameTransform":
        zoom, angle = 1.0, 0.0
        if self.choices:
            zoom = float(np.random.choice(self.choices))
        elif self.scale:
            smallest, largest = self.scale
            zoom = smallest + (largest - smallest) * self._rand_range(0, 1)
        if self.rotation:
            angle = self.rotation * (2 * self._rand_range(0, 1) - 1)
        return FrameTransform(Frame(image.shape[:2], tuple(self.size), zoom, angle), self.fill)


class FrameTransform(T.Transform):
    """`frame` applied to images uint8 (H, W, 3), and maps: of labels uint8, of depths float32."""

    def __init__(self, frame: Frame, fill: Sequence[int]):
        super().__init__()
        self.frame, self.fill = frame, fill

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        return np.asarray(self.frame.image(Image.fromarray(image), self.fill))

    def apply_segmentation(self, values: np.ndarray) -> np.ndarray:
        if values.dtype == np.float32:
            return self.frame.depths(values)
        return self.frame.labels(values, IGNORED)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        raise NotImplementedError("a frame is for models of pixels, which have no coordinates")
