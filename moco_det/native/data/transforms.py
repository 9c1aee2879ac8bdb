"""The geometry of augmentation as Detectron2's: resize, flip, perhaps a crop.

An `Augmentation`, a `RandomScale` or a `ScaleChoice` draws a `Transform`, which is then applied to
the image and to all that is annotated on it. Of models of pixels a `RandomFrame` draws a
`FramedTransform` instead, for the image and its map.

Shapes: an image is a PIL image or a uint8 array (3, H, W); boxes are (N, 4) float64, XYXY, and
coordinates (..., 2) float64, XY, both in continuous pixel coordinates of the image they lie on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from moco_det.common.errors import UserError
from moco_det.datasets.semantic import IGNORED
from moco_det.native.modeling.pixel_input import Frame, covering_size, scaled_size

# -- one drawn transform --------------------------------------------------------------------------


def shortest_edge_size(height: int, width: int, short_edge: int, max_size: int) -> tuple[int, int]:
    """Height and width after scaling the shorter edge to `short_edge`, the longer to <= `max_size`.

    Detectron2's `ResizeShortestEdge.get_output_shape`, rounding (half up) included.
    """
    scale = short_edge / min(height, width)
    if height < width:
        new_height, new_width = float(short_edge), scale * width
    else:
        new_height, new_width = scale * height, float(short_edge)
    longest = max(new_height, new_width)
    if longest > max_size:
        shrink = max_size / longest
        new_height, new_width = new_height * shrink, new_width * shrink
    return int(new_height + 0.5), int(new_width + 0.5)


@dataclass(frozen=True)
class Transform:
    """One drawn transform: a resize from `old` to `new` (height, width), then perhaps a flip."""

    old: tuple[int, int]
    new: tuple[int, int]
    flip: bool = False

    def apply_image(self, image: Image.Image, image_format: str = "RGB") -> np.ndarray:
        """The transformed image as a contiguous uint8 array (3, H, W), channels as asked for."""
        if self.new != self.old:
            image = image.resize(self.new[::-1], Image.Resampling.BILINEAR)
        pixels = np.array(image)  # (H, W, 3)
        if self.flip:
            pixels = pixels[:, ::-1]
        if image_format == "BGR":
            pixels = pixels[:, :, ::-1]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def apply_box(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) of the old image on the new one, clipped to it."""
        corners = self.apply_coords(boxes.reshape(-1, 2, 2))
        if self.flip:  # the right ones are left
            corners[..., 0] = corners[:, ::-1, 0]
        return np.clip(corners, 0, self.new[::-1]).reshape(-1, 4)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Coordinates (..., 2) of the old image on the new one, not clipped to it."""
        (old_height, old_width), (height, width) = self.old, self.new
        moved = coords * np.array([width / old_width, height / old_height])
        if self.flip:
            moved[..., 0] = width - moved[..., 0]
        return moved

    def apply_polygons(self, polygons: Sequence[Sequence[float]]) -> list[np.ndarray]:
        """Polygons [x0, y0, x1, y1, ...] as float64 arrays of the same layout, not clipped.

        Detectron2's numbers, but for polygons that are written in whole numbers only: those it
        moves in integer arithmetic, so that every coordinate is rounded down.
        """
        points = (np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons)
        return [self.apply_coords(p).reshape(-1) for p in points]

    def apply_segmentation(self, mask: np.ndarray) -> np.ndarray:
        """A uint8 mask or label map (old H, old W) as a contiguous (H, W), by the nearest pixel."""
        if self.new != self.old:
            image = Image.fromarray(mask).resize(self.new[::-1], Image.Resampling.NEAREST)
            mask = np.array(image)  # writable, as tensors have to be
        return np.ascontiguousarray(mask[:, ::-1] if self.flip else mask)

    def apply_keypoints(self, keypoints: np.ndarray, mirrored: Sequence[int]) -> np.ndarray:
        """Keypoints (N, K, 3) float64 of (x, y, visibility).

        `mirrored[k]` is the keypoint that takes the place of keypoint k in a flipped image. As in
        Detectron2, a point outside the image is no longer labelled (visibility 0), and what is not
        labelled is all zeros.
        """
        points, visibility = self.apply_coords(keypoints[..., :2]), keypoints[..., 2:]
        inside = ((points >= 0) & (points <= self.new[::-1])).all(axis=-1, keepdims=True)
        labelled = inside & (visibility != 0)
        moved = np.where(labelled, np.concatenate([points, visibility], axis=-1), 0.0)
        return moved[:, list(mirrored)] if self.flip else moved


@dataclass(frozen=True)
class FramedTransform:
    """One drawn transform: into a frame of fixed size, then perhaps a flip.

    `fill`: the RGB pixel of what becomes empty.
    """

    frame: Frame
    fill: tuple[int, int, int]
    flip: bool = False

    @property
    def new(self) -> tuple[int, int]:
        return self.frame.new

    def apply_image(self, image: Image.Image, image_format: str = "RGB") -> np.ndarray:
        """See `Transform.apply_image`."""
        framed = self.frame.image(image, self.fill)
        return Transform(self.new, self.new, self.flip).apply_image(framed, image_format)

    def apply_segmentation(self, labels: np.ndarray) -> np.ndarray:
        """A uint8 label map (old H, old W) as a contiguous (H, W), `IGNORED` where it is empty."""
        return self._flipped(self.frame.labels(labels, IGNORED))

    def apply_depth(self, depths: np.ndarray) -> np.ndarray:
        """A float32 depth map (old H, old W) as a contiguous (H, W), 0 where it is empty."""
        return self._flipped(self.frame.depths(depths))

    def _flipped(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values[:, ::-1] if self.flip else values)


# -- draws ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """Draws the `Transform` of an image: a short edge from `sizes`, and a flip half of the time.

    Args:
        sizes: short edges in pixels. "choice" draws one of them, "range" an integer between the
            two (both included). A drawn 0 leaves the size alone (Detectron2's convention).
        max_size: upper limit of the longer edge in pixels.
        sampling: "choice" or "range".
        flip: whether to flip left-right at all.
    """

    sizes: Sequence[int]
    max_size: int
    sampling: str = "choice"
    flip: bool = False

    def __post_init__(self):
        if self.sampling == "range" and len(self.sizes) != 2:
            raise UserError(
                f"INPUT.MIN_SIZE_TRAIN is {tuple(self.sizes)}: MIN_SIZE_TRAIN_SAMPLING 'range' "
                "takes two sizes, the smallest and the largest"
            )

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Transform:
        if self.sampling == "range":
            short_edge = int(rng.integers(self.sizes[0], self.sizes[1] + 1))
        else:
            short_edge = int(rng.choice(self.sizes))
        old = (height, width)
        new = shortest_edge_size(height, width, short_edge, self.max_size) if short_edge else old
        return Transform(old, new, flip=self.flip and rng.random() < 0.5)


@dataclass(frozen=True)
class RandomScale:
    """Draws the `Transform` of an image: its own size times a factor, and a flip half of the time.

    Args:
        smallest, largest: between which the factor is drawn uniformly.
        flip: whether to flip left-right at all.
    """

    smallest: float
    largest: float
    flip: bool = False

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Transform:
        factor = self.smallest + (self.largest - self.smallest) * rng.random()
        new = scaled_size(height, width, factor)
        return Transform((height, width), new, flip=self.flip and rng.random() < 0.5)


@dataclass(frozen=True)
class ScaleChoice:
    """Draws the `Transform` of an image: its own size times one of `factors`, and a flip half of
    the time.

    Args:
        factors: of which one is drawn, each as often as the others.
        window: (height, width) that the image is enlarged to cover, where it is smaller; () for
            none.
        flip: whether to flip left-right at all.
    """

    factors: Sequence[float]
    window: Sequence[int] = ()
    flip: bool = False

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Transform:
        new = covering_size(height, width, float(rng.choice(self.factors)), self.window)
        return Transform((height, width), new, flip=self.flip and rng.random() < 0.5)


@dataclass(frozen=True)
class RandomFrame:
    """Draws the `FramedTransform` of an image: zoom, angle, and a flip half of the time.

    Args:
        size: (height, width) of the frame.
        scale: (smallest, largest) zoom, drawn uniformly; () for none.
        choices: zooms of which one is drawn, in the place of `scale`; () for none.
        rotation: the largest angle in degrees, to either side, drawn uniformly.
        fill: the RGB pixel of what becomes empty.
        flip: whether to flip left-right at all.
    """

    size: tuple[int, int]
    fill: tuple[int, int, int]
    scale: Sequence[float] = ()
    choices: Sequence[float] = ()
    rotation: float = 0.0
    flip: bool = False

    def draw(self, rng: np.random.Generator, height: int, width: int) -> FramedTransform:
        zoom, angle = 1.0, 0.0
        if self.choices:
            zoom = float(rng.choice(self.choices))
        elif self.scale:
            smallest, largest = self.scale
            zoom = smallest + (largest - smallest) * rng.random()
        if self.rotation:
            angle = self.rotation * (2 * rng.random() - 1)
        frame = Frame((height, width), self.size, zoom, angle)
        return FramedTransform(frame, self.fill, flip=self.flip and rng.random() < 0.5)


@dataclass(frozen=True)
class FixedSize:
    """Stretches every image to `size` (height, width); nothing is drawn."""

    size: tuple[int, int]

    def draw(self, rng: np.random.Generator | None, height: int, width: int) -> Transform:
        return Transform((height, width), self.size)


@dataclass(frozen=True)
class RandomCrop:
    """Draws a window of `size` (height, width) at a uniform position; all of a shorter side.

    Detectron2's RandomCrop of type "absolute".
    """

    size: tuple[int, int]

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[slice, slice]:
        """What to index the last two axes of an image of that size with."""
        crop_height, crop_width = (
            min(wanted, side) for wanted, side in zip(self.size, (height, width), strict=True)
        )
        top = int(rng.integers(height - crop_height + 1))
        left = int(rng.integers(width - crop_width + 1))
        return slice(top, top + crop_height), slice(left, left + crop_width)
