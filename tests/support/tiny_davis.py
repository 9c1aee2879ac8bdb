"""Drawn videos in DAVIS 2017's layout: shapes that move over a background of stripes."""

from pathlib import Path

import numpy as np
from PIL import Image

from moco_det.common.images import label_colour

PALETTE = [channel for number in range(256) for channel in label_colour(number)]


def write_tiny_davis(
    root: Path, names=("disc", "pair"), frames: int = 4, size=(48, 64), split: str = "val"
) -> Path:
    """`names`: video i has i + 1 objects; `size`: height and width."""
    lists = root / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    for number, name in enumerate(names):
        folders = [root / kind / "480p" / name for kind in ("JPEGImages", "Annotations")]
        for folder in folders:
            folder.mkdir(parents=True)
        for t in range(frames):
            pixels, mask = draw_frame(t, number + 1, size)
            Image.fromarray(pixels).save(folders[0] / f"{t:05d}.jpg", quality=95)
            write_mask(folders[1] / f"{t:05d}.png", mask)
    return root


def draw_frame(t: int, objects: int, size) -> tuple[np.ndarray, np.ndarray]:
    """Frame `t`: objects are discs and squares that move by a 32nd of the width in each."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    stripes = 90 + 40 * np.sin(x / width * 25) + 30 * np.sin(y / height * 15 + 1)
    pixels = np.stack([stripes, stripes * 0.9, stripes * 0.7], axis=2)
    mask = np.zeros(size, np.uint8)
    for number in range(1, objects + 1):
        right = number % 2
        travelled = (t * width) // 32
        cx = width // 4 + travelled if right else 3 * width // 4 - travelled
        cy, radius = height * number // (objects + 1), height // 6
        dx, dy = x - cx, y - cy
        inside = dx**2 + dy**2 < radius**2 if right else np.maximum(abs(dx), abs(dy)) < radius
        colour = np.array([(220, 60, 40), (40, 90, 230), (60, 200, 80)][(number - 1) % 3])
        shade = 0.75 + 0.25 * np.sin((dx + dy) / radius * 4)  # moves with the object
        pixels[inside] = (colour * shade[..., None])[inside]
        mask[inside] = number
    return pixels.clip(0, 255).astype(np.uint8), mask


def write_mask(path: Path, mask: np.ndarray) -> None:
    image = Image.fromarray(mask)
    image.putpalette(PALETTE)
    image.save(path)
