"""A data set that takes milliseconds to write and to train on: squares and bars, VOC layout."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((48, 64), (64, 48))  # height, width: tall and wide ones, for aspect-ratio grouping
KINDS = {"bar": (8, 24, (220, 30, 30)), "square": (16, 16, (30, 30, 220))}  # h, w, colour

XML = """<annotation><size><width>{width}</width><height>{height}</height></size>
<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated>
<difficult>0</difficult><bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin>
<xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object></annotation>"""


def write_tiny_voc(root: Path, images: int = 12) -> Path:
    """`images` images with one object each, in the splits "train" (two thirds) and "test"."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    names = [f"{i:03d}" for i in range(images)]
    for i, name in enumerate(names):
        height, width = SIZES[i % 2]
        kind = sorted(KINDS)[i // 2 % 2]
        h, w, colour = KINDS[kind]
        y, x = int(rng.integers(0, height - h)), int(rng.integers(0, width - w))
        pixels = rng.integers(100, 150, (height, width, 3)).astype(np.uint8)
        pixels[y : y + h, x : x + w] = colour
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        box = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
        text = XML.format(width=width, height=height, name=kind, **box)
        (root / "Annotations" / f"{name}.xml").write_text(text)
    cut = images * 2 // 3
    for split, chosen in (("train", names[:cut]), ("test", names[cut:])):
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(chosen))
    return root


TINY_DETECTOR = """
MODEL:
  DEVICE: cpu
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS:  # a ResNet-50 a quarter as wide has an eighth of a ResNet-18's weights to save
    DEPTH: 50
    STEM_OUT_CHANNELS: 16
    WIDTH_PER_GROUP: 16
    RES2_OUT_CHANNELS: 64
    STRIDE_IN_1X1: False
    OUT_FEATURES: [res2, res3, res4, res5]
    NORM: BN
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 16}
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32], [64], [128]]}
  RPN:
    IN_FEATURES: [p2, p3, p4, p5, p6]
    BATCH_SIZE_PER_IMAGE: 16
    PRE_NMS_TOPK_TRAIN: 50
    PRE_NMS_TOPK_TEST: 20
    POST_NMS_TOPK_TRAIN: 20
    POST_NMS_TOPK_TEST: 10
  ROI_HEADS:
    NAME: StandardROIHeads
    IN_FEATURES: [p2, p3, p4, p5]
    NUM_CLASSES: 2
    BATCH_SIZE_PER_IMAGE: 16
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 16, POOLER_RESOLUTION: 7}
INPUT: {MIN_SIZE_TRAIN: [48, 64], MAX_SIZE_TRAIN: 96, MIN_SIZE_TEST: 48, MAX_SIZE_TEST: 96}
DATASETS: {TRAIN: ["voc:ROOT:train"], TEST: ["voc:ROOT:test"]}
DATALOADER: {NUM_WORKERS: 0}
SOLVER:
  IMS_PER_BATCH: 2
  BASE_LR: 0.01
  MAX_ITER: 6
  STEPS: [4]
  WARMUP_ITERS: 2
  CHECKPOINT_PERIOD: 2
TEST: {EVAL_PERIOD: 3, PRECISE_BN: {ENABLED: True, NUM_ITER: 2}}
SEED: 3
"""


def write_tiny_config(path: Path, root: Path) -> Path:
    """A detector for `write_tiny_voc(root)`: six iterations, checkpoints after 2, 4 and 6."""
    path.write_text(TINY_DETECTOR.replace("ROOT", str(root)))
    return path
