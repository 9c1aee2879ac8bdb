"""A semantic data set in VOC's layout that takes milliseconds to write and seconds to learn."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((96, 128), (112, 80))  # height, width
COLOURS = {3: (220, 30, 30), 15: (30, 30, 220)}  # label -> colour of its square
SIDE, BORDER = 48, 3  # pixels; around a square a border is void, as in VOC


def write_tiny_semantic(root: Path, images: int = 6, split: str = "train") -> Path:
    """`images` images with one square each, alternately of the labels 3 and 15, on background."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    names = [f"{i:03d}" for i in range(images)]
    for i, name in enumerate(names):
        height, width = SIZES[i // 2 % 2]
        label = sorted(COLOURS)[i % 2]
        y, x = (int(rng.integers(BORDER, side - SIDE - BORDER)) for side in (height, width))
        pixels = rng.integers(100, 150, (height, width, 3)).astype(np.uint8)
        pixels[y : y + SIDE, x : x + SIDE] = COLOURS[label]
        labels = np.zeros((height, width), np.uint8)
        labels[y - BORDER : y + SIDE + BORDER, x - BORDER : x + SIDE + BORDER] = 255
        labels[y : y + SIDE, x : x + SIDE] = label
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        save_palette(labels, root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def save_palette(labels: np.ndarray, path: Path) -> None:
    """As VOC's: a palette image, whose colours are no grey of the labels' numbers."""
    image = Image.fromarray(labels).convert("P")
    image.putpalette([(37 * i + channel * 91) % 256 for i in range(256) for channel in range(3)])
    image.putdata(labels.reshape(-1).tolist())
    image.save(path)


# On res4 of a ResNet-18, whose stride is 16: the layers of the real run, and far fewer.
TINY_SEGMENTOR = """
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: SemanticSegmentor
  PIXEL_MEAN: [123.675, 116.28, 103.53]
  PIXEL_STD: [58.395, 57.12, 57.375]
  BACKBONE: {FREEZE_AT: 0}
  RESNETS:
    DEPTH: 18
    RES2_OUT_CHANNELS: 64
    STRIDE_IN_1X1: False
    OUT_FEATURES: [res4]
    NORM: SyncBN
  SEM_SEG_HEAD:
    NAME: FCN16Head
    IN_FEATURES: [res4]
    COMMON_STRIDE: 16
    NUM_CLASSES: 21
    CONVS_DIM: 32
    NORM: SyncBN
INPUT:
  FORMAT: RGB
  RANDOM_SCALE: [0.9, 1.1]
  CROP: {ENABLED: True, TYPE: absolute, SIZE: [97, 97]}
  MIN_SIZE_TEST: 0
DATASETS: {TRAIN: ["voc_sem_seg:ROOT:train"], TEST: ["voc_sem_seg:ROOT:train"]}
DATALOADER: {NUM_WORKERS: 0, ASPECT_RATIO_GROUPING: False}
SOLVER:
  IMS_PER_BATCH: 4
  BASE_LR: 0.05
  MAX_ITER: 3
  STEPS: []
  WARMUP_ITERS: 2
  CHECKPOINT_PERIOD: 100
SEED: 3
"""


def write_tiny_segmentor(path: Path, root: Path) -> Path:
    """A segmentor for `write_tiny_semantic(root)`: three iterations."""
    path.write_text(TINY_SEGMENTOR.replace("ROOT", str(root)))
    return path
