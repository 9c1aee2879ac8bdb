"""NYU Depth v2's layout in miniature: rooms of a floor and a box, of milliseconds to write."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (48, 64)  # height, width
WALL, FLOOR, BOX = 1, 2, 29  # the numbers in the files; 0 is void


def write_tiny_nyud(root: Path, images: int = 3, split: str = "train") -> Path:
    """Each image is a grey wall 4 m away, a dark floor and a bright box 1, 2, 3, ... m away."""
    rng = np.random.default_rng(0)
    for folder in ("images", "segmentation", "depth", "gt_sets"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = [f"{i:04d}" for i in range(1, images + 1)]
    height, width = SIZE
    for i, name in enumerate(names):
        pixels = np.full((height, width, 3), 128) + rng.integers(-9, 9, (height, width, 3))
        labels = np.full(SIZE, WALL, np.uint8)
        depths = np.full(SIZE, 4, np.float32)
        pixels[height // 2 :], labels[height // 2 :] = 40, FLOOR
        depths[height // 2 :] = np.linspace(4, 1, height - height // 2)[:, None]
        x = int(rng.integers(4, width - 28))
        box = slice(12, 36), slice(x, x + 24)
        pixels[box], labels[box], depths[box] = (250, 220 - 60 * i, 60 * i), BOX, 1 + i % 3
        labels[:2], depths[:, :2] = 0, 0  # not annotated, not measured
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{name}.jpg", quality=95)
        Image.fromarray(labels).save(root / "segmentation" / f"{name}.png")
        np.save(root / "depth" / f"{name}.npy", depths)
    (root / "gt_sets" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


# On res3 of a ResNet-18, whose stride is 8: the layers of the real runs, and far fewer.
TINY = """
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: {architecture}
  PIXEL_MEAN: [123.675, 116.28, 103.53]
  PIXEL_STD: [58.395, 57.12, 57.375]
  BACKBONE: {{FREEZE_AT: 0}}
  RESNETS:
    DEPTH: 18
    RES2_OUT_CHANNELS: 64
    STRIDE_IN_1X1: False
    OUT_FEATURES: [res3]
    NORM: SyncBN
  SEM_SEG_HEAD:
    NAME: {head}
    IN_FEATURES: [res3]
    COMMON_STRIDE: 8
    NUM_CLASSES: {classes}
    CONVS_DIM: 16
    DILATION: 1
    NORM: SyncBN
INPUT:
  FORMAT: RGB
  FIXED_SIZE: [48, 80]
  SCALE_CHOICES: [1.0, 1.2]
  RANDOM_ROTATION: 5.0
DATASETS: {{TRAIN: ["{kind}:{root}:train"], TEST: ["{kind}:{root}:train"]}}
DATALOADER: {{NUM_WORKERS: 0, ASPECT_RATIO_GROUPING: False}}
SOLVER:
  OPTIMIZER: Adam
  LR_SCHEDULER_NAME: WarmupPolyLR
  IMS_PER_BATCH: 3
  BASE_LR: 0.003
  MAX_ITER: 3
  WARMUP_ITERS: 0
  CHECKPOINT_PERIOD: 100
SEED: 3
"""


def write_tiny_pixel_config(path: Path, root: Path, depth: bool) -> Path:
    """A model of depths, or of labels, for `write_tiny_nyud(root)`: three iterations of Adam."""
    kind, architecture, head, classes = (
        ("nyud_depth", "DepthEstimator", "FCNDepthHead", 1)
        if depth
        else ("nyud_sem_seg", "SemanticSegmentor", "FCN16Head", 40)
    )
    options = {"architecture": architecture, "head": head, "classes": classes}
    path.write_text(TINY.format(kind=kind, root=root, **options))
    return path
