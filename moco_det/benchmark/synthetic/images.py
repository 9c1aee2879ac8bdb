"""A small data set drawn from a seed, so that everything can be run without a download.

Eight classes, each one shape filled with one texture in two hues, as bricks or leaves have theirs.
Everything else is a nuisance drawn anew for every object: how bright and how saturated it is, the
exposure, contrast, scale, stretch, rotation, texture period, background, focus and sensor noise.

    images/{train,val}/<class>/*.jpg   a close-up of one object each; MoCo trains on `train` and
                                       ignores the folders, the kNN monitor reads classes from them
    scenes/                            VOC layout, 1 to 4 objects of any class in one image

Image i of a split depends on (seed, split, i) alone. Boxes are those of the drawn masks: objects
lie inside the image and do not cover one another, so a box is exact to the pixel.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

IMAGE_SIZE = 128  # pixels, both sides
JPEG_QUALITY = 92
RADIUS_ALONE = (62, 92)  # pixels, half the extent of an object in images/: it leaves the frame
RADIUS_SCENE = (17, 33)  # pixels, half the extent of an object in scenes/
MAX_OBJECTS = 4  # in one scene
SPLIT_IDS = {
    "images/train": 0,
    "images/val": 1,
    "scenes/train": 2,
    "scenes/test": 3,
    "hearts/train": 4,
    "hearts/test": 5,
}


@dataclass(frozen=True)
class Scene:
    """One drawn image: `image` (H, W, 3) uint8 BGR, and for each object a boolean (H, W) mask and
    an outline (P, 2), x and y, where whole numbers are the pixels' centres."""

    image: np.ndarray
    masks: list[np.ndarray]
    outlines: list[np.ndarray]
    classes: list[int]


# -- shapes: closed polygons (P, 2) within the unit circle ----------------------------------------


def _on_circle(angles: np.ndarray, radii: np.ndarray | float = 1.0) -> np.ndarray:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _regular(corners: int) -> np.ndarray:
    return _on_circle(np.arange(corners) * 2 * np.pi / corners)


def _turn(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _cross() -> np.ndarray:
    arm, end = 0.34, 0.94
    quarter = np.array([[end, -arm], [end, arm], [arm, arm]])
    return np.concatenate([quarter @ _turn(k * np.pi / 2).T for k in range(4)])


def _crescent() -> np.ndarray:
    outer = _on_circle(np.linspace(0.75, 2 * np.pi - 0.75, 40))
    inner = _on_circle(np.linspace(2 * np.pi - 1.15, 1.15, 30), 0.75) + [0.42, 0.0]
    return np.concatenate([outer, inner])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 17


STAR = _on_circle(np.arange(10) * np.pi / 5, np.tile([1.0, 0.45], 5))
BAR = np.array([[-0.93, -0.36], [0.93, -0.36], [0.93, 0.36], [-0.93, 0.36]])


# -- textures: (u, v) in periods, r = radius in periods -> values in [-1, 1] ----------------------


def _rings(u, v, rng):
    return np.sin(2 * np.pi * np.hypot(u, v))


def _bricks(u, v, rng):
    row = np.floor(1.5 * v)
    mortar_along = np.abs((1.5 * v) % 1 - 0.5) > 0.36
    mortar_across = np.abs((0.75 * u + 0.5 * (row % 2)) % 1 - 0.5) > 0.42
    return np.where(mortar_along | mortar_across, 1.0, -1.0)


def _stripes(u, v, rng):
    return np.sin(2 * np.pi * u)


def _rays(u, v, rng):
    return np.sin(8 * np.arctan2(v, u))


def _checks(u, v, rng):
    return np.sin(np.pi * 1.3 * u) * np.sin(np.pi * 1.3 * v) * 2


def _waves(u, v, rng):
    return np.sin(2 * np.pi * (v + 0.4 * np.sin(np.pi * 0.9 * u)))


def _dots(u, v, rng):
    row = np.floor(v * 1.15)
    across = (u + 0.5 * (row % 2)) % 1 - 0.5
    return np.clip(4 * (0.33 - np.hypot(across, (v * 1.15) % 1 - 0.5)), -1, 1)


def _grain(u, v, rng):
    cells = max(4, int(round(3.2 * float(u.max() - u.min()) / np.sqrt(2))))
    noise = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(noise, u.shape[::-1], interpolation=cv2.INTER_CUBIC)


Texture = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Look:
    """What makes a class: a polygon (P, 2) in the unit circle, a texture, two hues in 0..1."""

    shape: np.ndarray
    texture: Texture
    hues: tuple[float, float]


LOOKS: dict[str, Look] = {
    "brick_square": Look(_regular(4), _bricks, (0.0, 0.5)),
    "checked_cross": Look(_cross(), _checks, (0.12, 0.45)),
    "dotted_heart": Look(_heart(), _dots, (0.25, 0.37)),
    "grainy_bar": Look(BAR, _grain, (0.37, 0.77)),
    "ray_star": Look(STAR, _rays, (0.5, 0.75)),
    "ringed_disc": Look(_regular(48), _rings, (0.62, 0.12)),
    "striped_triangle": Look(_regular(3), _stripes, (0.75, 0.95)),
    "wavy_crescent": Look(_crescent(), _waves, (0.87, 0.47)),
}
CLASSES = tuple(LOOKS)  # sorted, as the VOC reader sorts the names it finds


# -- one image ------------------------------------------------------------------------------------


def _bgr(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Colours (N, 3) in 0..255 from hue, saturation and value (N, 1) in 0..1; hue wraps."""
    tint = np.clip(np.abs((hue * 6 + [2, 4, 0]) % 6 - 3) - 1, 0, 1)
    return 255 * value * (1 - saturation * (1 - tint))


def _dull_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random BGR colours (count, 3) of any hue and little saturation, for what is no object."""
    hue, saturation = rng.random((count, 1)), rng.uniform(0, 0.3, (count, 1))
    return _bgr(hue, saturation, rng.uniform(0.15, 0.9, (count, 1)))


def _two_colours(rng: np.random.Generator, hues: tuple[float, float]) -> np.ndarray:
    """Two BGR colours (2, 3) near `hues` whose brightness differs enough for a texture to show."""
    near = np.array(hues)[:, None] + rng.normal(0, 0.03, (2, 1))
    while True:
        colours = _bgr(near, rng.uniform(0.45, 1, (2, 1)), rng.uniform(0.25, 1, (2, 1)))
        if abs(np.subtract(*(colours @ [0.114, 0.587, 0.299]))) > 40:
            return colours


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Dull smooth clouds under random lines, arcs and flat patches: (size, size, 3) uint8."""
    cells = int(rng.integers(2, 8))
    clouds = _dull_colours(rng, cells**2).reshape(cells, cells, 3).astype(np.float32)
    canvas = np.clip(cv2.resize(clouds, (size, size), interpolation=cv2.INTER_CUBIC), 0, 255)
    canvas = canvas.astype(np.uint8)
    for _ in range(int(rng.integers(4, 14))):
        colour = _dull_colours(rng, 1)[0].tolist()
        x, y, x2, y2 = rng.integers(0, size, 4).tolist()
        kind = rng.integers(3)
        if kind == 0:
            cv2.line(canvas, (x, y), (x2, y2), colour, int(rng.integers(1, 5)), cv2.LINE_AA)
        elif kind == 1:
            axes = rng.integers(3, size // 3, 2).tolist()
            turn, start = rng.uniform(0, 360, 2)
            end = start + rng.uniform(60, 300)
            thickness = int(rng.integers(1, 4))
            cv2.ellipse(canvas, (x, y), axes, turn, start, end, colour, thickness, cv2.LINE_AA)
        else:
            corners = rng.integers(-size // 6, size // 6, (int(rng.integers(3, 6)), 2)) + [x, y]
            patch = cv2.fillPoly(canvas.copy(), [cv2.convexHull(corners.astype(np.int32))], colour)
            opacity = float(rng.uniform(0.3, 0.9))
            canvas = cv2.addWeighted(patch, opacity, canvas, 1 - opacity, 0)
    return canvas


def _polygon_alpha(polygon: np.ndarray, size: int) -> np.ndarray:
    """Coverage (size, size) uint8 of a polygon given in pixels, with anti-aliased edges."""
    fixed_point = np.round(polygon * 16).astype(np.int32)
    return cv2.fillPoly(np.zeros((size, size), np.uint8), [fixed_point], 255, cv2.LINE_AA, shift=4)


def _pose(rng: np.random.Generator) -> np.ndarray:
    """A random stretch followed by a random rotation, (2, 2)."""
    stretch = rng.permutation([1.0, rng.uniform(0.8, 1.0)])
    return _turn(rng.uniform(0, 2 * np.pi)) @ np.diag(stretch)


def _fill(canvas: np.ndarray, alpha: np.ndarray, centre, pose, period, look: Look, rng) -> None:
    """Blend a look's texture into `canvas` (H, W, 3) uint8 where `alpha` covers it, in place.

    `pose` (2, 2) turns and stretches the texture about `centre` (x, y), as it does the shape;
    `period` is the texture's, in pixels.
    """
    x0, y0, width, height = cv2.boundingRect(alpha)
    window = np.s_[y0 : y0 + height, x0 : x0 + width]
    y, x = np.mgrid[window].astype(np.float32)
    offsets = np.stack([x - centre[0], y - centre[1]], axis=-1) @ np.linalg.inv(pose).T / period
    phase = rng.uniform(-0.1, 0.1, 2)
    pattern = look.texture(offsets[..., 0] + phase[0], offsets[..., 1] + phase[1], rng)
    mix = np.clip(0.5 + 1.2 * pattern, 0, 1)[..., None]
    first, second = _two_colours(rng, look.hues)
    cover = alpha[window][..., None] / 255.0
    blended = (1 - cover) * canvas[window] + cover * (mix * first + (1 - mix) * second)
    canvas[window] = np.round(blended)


def _place(rng: np.random.Generator, shape: np.ndarray, radius: float, free: np.ndarray):
    """Find a spot where the shape lies inside the image and on `free` pixels only.

    Every miss makes the object 1 % smaller, so the search ends, and mostly after a few tries.
    Returns (alpha, centre, pose, radius).
    """
    size = len(free)
    while True:
        pose = _pose(rng)
        corners = radius * shape @ pose.T
        low, high = 1 - corners.min(axis=0), size - 2 - corners.max(axis=0)
        if (low < high).all():
            centre = rng.uniform(low, high)
            alpha = _polygon_alpha(corners + centre, size)
            if free[alpha > 0].all():
                return alpha, centre, pose, radius
        radius *= 0.99


def _expose(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """What a camera makes of it: random contrast and exposure, slight blur, sensor noise."""
    drawn, mean = canvas.astype(np.float32), float(canvas.mean())
    exposed = (drawn - mean) * rng.uniform(0.45, 1.1) + mean * rng.uniform(0.45, 1.25)
    seen = cv2.GaussianBlur(exposed, (0, 0), rng.uniform(0.2, 0.6))
    seen += np.float32(rng.uniform(1, 4)) * rng.standard_normal(seen.shape, dtype=np.float32)
    return np.clip(np.round(seen), 0, 255).astype(np.uint8)


def draw_close_up(rng: np.random.Generator, index: int, size: int = IMAGE_SIZE) -> np.ndarray:
    """Draw an object of class `index` that fills most of the image and leaves it at the sides."""
    canvas, look, pose = _background(rng, size), LOOKS[CLASSES[index]], _pose(rng)
    radius, centre = rng.uniform(*RADIUS_ALONE), rng.uniform(0.35 * size, 0.65 * size, 2)
    alpha = _polygon_alpha(radius * look.shape @ pose.T + centre, size)
    _fill(canvas, alpha, centre, pose, radius * rng.uniform(0.38, 0.55), look, rng)
    return _expose(rng, canvas)


def draw_scene(
    rng: np.random.Generator, classes: list[int], radii: list[float], size: int = IMAGE_SIZE
) -> Scene:
    """Draw objects of the given classes and radii (pixels) at random places over clutter.

    No two objects cover each other and none leaves the image; a radius shrinks where there is no
    room for it. A mask holds the pixels that the object covers by half or more.
    """
    canvas, free = _background(rng, size), np.ones((size, size), bool)
    masks, outlines = [], []
    for index, radius in zip(classes, radii, strict=True):
        look = LOOKS[CLASSES[index]]
        alpha, centre, pose, radius = _place(rng, look.shape, radius, free)
        _fill(canvas, alpha, centre, pose, radius * rng.uniform(0.38, 0.55), look, rng)
        free &= alpha == 0
        masks.append(alpha >= 128)
        outlines.append(radius * look.shape @ pose.T + centre)
    return Scene(_expose(rng, canvas), masks, outlines, list(classes))


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) of a mask in pixels, the upper ends exclusive."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return x, y, x + width, y + height


# -- the two folders ------------------------------------------------------------------------------


def generator(seed: int, split: str, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, SPLIT_IDS[split], index])


def write_jpeg(path: Path, image: np.ndarray) -> None:
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    path.write_bytes(encoded.tobytes())


def write_image_folder(root: Path, split: str, seed: int, per_class: int) -> None:
    """Write `root`/images/`split`/<class>/*.jpg, `per_class` images of each class."""
    folder = Path(root) / "images" / split
    for index, (name, number) in enumerate(itertools.product(CLASSES, range(per_class))):
        image = draw_close_up(generator(seed, f"images/{split}", index), CLASSES.index(name))
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_jpeg(folder / name / f"{number:05d}.jpg", image)


def _annotation(file_name: str, scene: Scene) -> str:
    """VOC XML: 1-based inclusive corners, so xmin = x0 + 1 and xmax = x1 (exclusive, 0-based)."""
    height, width = scene.image.shape[:2]
    lines = [
        "<annotation>",
        f"  <filename>{file_name}</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    for index, mask in zip(scene.classes, scene.masks, strict=True):
        x0, y0, x1, y1 = tight_box(mask)
        corners = f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        lines += [
            f"  <object><name>{CLASSES[index]}</name><truncated>0</truncated>"
            f"<difficult>0</difficult><bndbox>{corners}</bndbox></object>"
        ]
    return "\n".join([*lines, "</annotation>", ""])


def _dealt_classes(rng: np.random.Generator) -> Iterator[int]:
    """Class indices without end: every run of `len(CLASSES)` holds each class once."""
    while True:
        yield from rng.permutation(len(CLASSES)).tolist()


def draw_scenes(
    split: str,
    seed: int,
    count: int,
    radius: tuple[float, float] = RADIUS_SCENE,
    most_objects: int = MAX_OBJECTS,
) -> Iterator[Scene]:
    """Yield the scenes of a split. The first n are the same whatever `count` is."""
    dealer = _dealt_classes(generator(seed, f"scenes/{split}", -1 % 2**32))
    for index in range(count):
        rng = generator(seed, f"scenes/{split}", index)
        objects = int(rng.integers(1, most_objects + 1))
        radii = rng.uniform(*radius, objects).tolist()
        yield draw_scene(rng, list(itertools.islice(dealer, objects)), radii)


def write_voc_scenes(
    root: Path, split: str, seed: int, count: int, **objects: Any
) -> dict[str, Scene]:
    """Add a split to `root`/scenes in VOC layout: images, annotations and the list of names.

    Args:
        objects: their `radius` and `most_objects`, see `draw_scenes`.

    Returns:
        Name of each image, without its ending -> the scene.
    """
    folder = Path(root) / "scenes"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    drawn = draw_scenes(split, seed, count, **objects)
    scenes = {f"{split}_{i:05d}": scene for i, scene in enumerate(drawn)}
    for name, scene in scenes.items():
        write_jpeg(folder / "JPEGImages" / f"{name}.jpg", scene.image)
        (folder / "Annotations" / f"{name}.xml").write_text(_annotation(f"{name}.jpg", scene))
    (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(scenes) + "\n")
    return scenes


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the embedded data set.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-images", type=int, default=250, help="per class, for MoCo")
    parser.add_argument("--val-images", type=int, default=50, help="per class, for the kNN monitor")
    parser.add_argument("--train-scenes", type=int, default=400)
    parser.add_argument("--test-scenes", type=int, default=200)
    args = parser.parse_args()
    cv2.setNumThreads(1)  # on images this small, handing work to threads costs more than the work
    write_image_folder(args.output, "train", args.seed, args.train_images)
    write_image_folder(args.output, "val", args.seed, args.val_images)
    total = len(CLASSES) * (args.train_images + args.val_images)
    print(f"drew {total} images of {len(CLASSES)} classes in {args.output / 'images'}", flush=True)
    write_voc_scenes(args.output, "train", args.seed, args.train_scenes)
    write_voc_scenes(args.output, "test", args.seed, args.test_scenes)
    total = args.train_scenes + args.test_scenes
    print(f"drew {total} annotated scenes in {args.output / 'scenes'}", flush=True)


if __name__ == "__main__":
    main()
