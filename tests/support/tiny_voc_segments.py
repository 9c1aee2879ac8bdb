"""A few drawn images in the layout of PASCAL VOC's segmentation split."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {7: (200, 40, 40), 12: (40, 160, 60), 15: (50, 60, 210)}  # car, dog, person


def write_tiny_segments(root: Path) -> Path:
    """Three images of train and two of val: blocks of colour on grey, each with a void border."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(1)
    for split, count in (("train", 3), ("val", 2)):
        names = [f"{split}_{i}" for i in range(count)]
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            pixels, labels = _draw(rng)
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            Image.fromarray(labels).save(root / "SegmentationClass" / f"{name}.png")
    return root


def _draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = np.full((60, 80, 3), 120.0), np.zeros((60, 80), np.uint8)
    for column, number in enumerate(rng.permutation(list(COLOURS))):
        top, left = rng.integers(0, 12), 26 * column + rng.integers(0, 3)
        block = slice(top, top + 48), slice(left, left + 25)
        pixels[block], labels[block] = COLOURS[number], 255
        labels[top + 1 : top + 47, left + 1 : left + 24] = number
    pixels += rng.normal(0, 40, 3)  # of the light
    return (pixels + rng.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8), labels
