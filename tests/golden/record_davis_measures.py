"""Record what the official davis2017-evaluation measures on drawn masks.

    PYTHONPATH=DAVIS2017_EVALUATION python tests/golden/record_davis_measures.py COMMIT

It needs scikit-image and tqdm. davis_measures.yaml keeps J and F of each object, "SEQUENCE_NUMBER".
The masks that it reads are those that `MaskFolder` writes.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

FILE = Path(__file__).with_name("davis_measures.yaml")
SOURCE = "davisvideochallenge/davis2017-evaluation"
SIZES = {"small": (40, 60), "wide": (150, 300)}  # a boundary's tolerance is 1 pixel, and 3
FRAMES = 7


def drawn_masks() -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Sequence -> true and found masks: three objects each, of discs and rectangles.

    Some are absent in one or both, cover each other or the whole frame, or touch its border; some
    true pixels are void.
    """
    random = np.random.RandomState(0)
    return {name: _draw(random, *size) for name, size in SIZES.items()}


def _draw(random, height: int, width: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    y, x = np.mgrid[:height, :width]
    true, found = [], []
    for t in range(FRAMES):
        masks = np.zeros((2, height, width), np.uint8)
        for number in (1, 2, 3):
            centre = random.randint(0, height), random.randint(0, width)
            radius = random.randint(3, height // 3)
            for mask in masks:  # the found one is moved, and larger or smaller
                dy, dx = y - centre[0], x - centre[1]
                far = np.hypot(dy, dx) if number % 2 else np.maximum(abs(dy), abs(dx))
                if t == 0 or random.rand() < 0.85:
                    mask[far < radius] = number
                centre = tuple(c + random.randint(-2, 3) for c in centre)
                radius += random.randint(-2, 3)
        true.append(masks[0])
        found.append(masks[1])
    for number in (1, 2, 3):  # the first mask has them all
        true[0][:2, 2 * number : 2 * number + 2] = number
    true[2][5:9, 5:9] = 255
    found[3][:] = 2
    true[4][:], found[4][:] = 3, 3
    return true, found


def write_dataset(root: Path) -> None:
    """The true masks in DAVIS' layout; the frames are black."""
    from PIL import Image

    for name, (masks, _) in drawn_masks().items():
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / "480p" / name).mkdir(parents=True)
        for t, mask in enumerate(masks):
            black = Image.new("RGB", mask.shape[::-1])
            black.save(root / "JPEGImages" / "480p" / name / f"{t:05d}.jpg")
            Image.fromarray(mask).save(root / "Annotations" / "480p" / name / f"{t:05d}.png")
    lists = root / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in SIZES))


def record() -> dict[str, dict[str, float]]:
    from davis2017.evaluation import DAVISEvaluation

    from pretrain.data.davis import Davis
    from pretrain.evaluation.video_segmentation import MaskFolder

    with tempfile.TemporaryDirectory() as name:
        root, folder = Path(name, "davis"), Path(name, "masks")
        write_dataset(root)
        folder.mkdir()
        for video in Davis(root).videos():
            MaskFolder(folder).write(video, drawn_masks()[video.name][1])
        official = DAVISEvaluation(davis_root=str(root), task="semi-supervised", gt_set="val")
        found = official.evaluate(str(folder))
    return {
        measure: {key: float(value) for key, value in found[measure]["M_per_object"].items()}
        for measure in ("J", "F")
    }


if __name__ == "__main__":
    content = {"source": f"{SOURCE}@{sys.argv[1]}", **record()}
    FILE.write_text(yaml.safe_dump(content, sort_keys=False))
