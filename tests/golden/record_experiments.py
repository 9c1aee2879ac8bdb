"""Record what Detectron2 computes for every experiment of configs/, narrowed.

    PYTHONPATH=DETECTRON2:DETECTRON2/projects/DensePose python tests/golden/record_experiments.py

The experiments' own YAMLs, with fewer channels and regions. Weights and inputs come from numpy's
RandomState and all anchors and proposals are sampled, as in record_model.py, so that no number
depends on a version of torch. Every quantity of `parity.probe` is summarised by its length and
its products with two fixed vectors, which no other tensor of its size is likely to share.
"""

from pathlib import Path

import numpy as np
import torch
from record_model import GT_BOXES, GT_POLYGONS, ORIGINAL, fill, images
from recording import write

from moco_det.densepose.points import DensePosePoints

CONFIGS = Path(__file__).parents[2] / "configs"
NARROW = """
MODEL.DEVICE cpu MODEL.WEIGHTS '' MODEL.RESNETS.STEM_OUT_CHANNELS 8
MODEL.FPN.OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 16
MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (16,16) MODEL.SEM_SEG_HEAD.CONVS_DIM 16
MODEL.ROI_DENSEPOSE_HEAD.CONV_HEAD_DIM 16 MODEL.ROI_DENSEPOSE_HEAD.NUM_STACKED_CONVS 2
MODEL.RPN.BATCH_SIZE_PER_IMAGE 20000 MODEL.RPN.POSITIVE_FRACTION 1.0
MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.POST_NMS_TOPK_TEST 20
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 100 MODEL.ROI_HEADS.POSITIVE_FRACTION 1.0
MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 TEST.DETECTIONS_PER_IMAGE 10 SOLVER.BASE_LR 0.01
"""
# What narrows a ResNet depends on its blocks.
NARROW_RESNET = {
    18: "MODEL.RESNETS.RES2_OUT_CHANNELS 64",
    50: "MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.RESNETS.WIDTH_PER_GROUP 4",
}


def experiments() -> list[str]:
    """The names of all YAMLs that are runs, such as "coco_R50_C4_2x_moco"."""
    paths = [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("quick/*.yaml")]
    names = (path.relative_to(CONFIGS).with_suffix("").as_posix() for path in paths)
    return sorted(name for name in names if "Base-" not in name)


def options(depth: int) -> list[str]:
    """KEY VALUE pairs over an experiment's YAML."""
    return [value.strip("'") for value in (NARROW + NARROW_RESNET[depth]).split()]


def items(cfg) -> list[dict]:
    """Two training inputs of the kind that the model of `cfg` wants: see `parity.probe`."""
    draw = labels if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor" else objects
    random = np.random.RandomState(1)
    return [
        {"image": image, "height": height, "width": width, **draw(cfg, random, index)}
        for index, (image, (height, width)) in enumerate(zip(images(), ORIGINAL, strict=True))
    ]


def labels(cfg, random: np.random.RandomState, index: int) -> dict:
    """Squares of one class each; the one beyond the last class is ignored."""
    head, size = cfg.MODEL.SEM_SEG_HEAD, images()[index].shape[1:]
    squares = random.randint(0, head.NUM_CLASSES + 1, (12, 16))
    squares[squares == head.NUM_CLASSES] = head.IGNORE_VALUE
    pixels = np.kron(squares, np.ones((8, 8)))[: size[0], : size[1]]
    return {"sem_seg": torch.from_numpy(pixels).long()}


def objects(cfg, random: np.random.RandomState, index: int) -> dict:
    boxes, masks = GT_BOXES[index], GT_POLYGONS[index]
    if cfg.INPUT.MASK_FORMAT == "bitmask":
        masks = bit_masks(masks, images()[index].shape[1:])
    classes = random.randint(0, cfg.MODEL.ROI_HEADS.NUM_CLASSES, len(boxes))
    share = random.uniform(size=(len(boxes), cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, 2))
    sides = (boxes[:, 2:] - boxes[:, :2])[:, None]
    points = boxes[:, None, :2] + torch.from_numpy(share).float() * sides
    return {
        "gt_boxes": boxes,
        "gt_classes": torch.from_numpy(classes).long(),
        "gt_masks": masks,
        "gt_keypoints": torch.cat([points, torch.full((*points.shape[:2], 1), 2.0)], dim=2),
        "gt_densepose": [dense_pose(np.random.RandomState(label)) for label in range(len(boxes))],
    }


def dense_pose(random: np.random.RandomState) -> DensePosePoints:
    """Points all over a box, and parts of the body in squares."""
    x, y, u, v = torch.from_numpy(random.uniform(size=(4, 30))).float()
    charts = torch.from_numpy(random.randint(0, 25, 30)).long()
    parts = np.kron(random.randint(0, 15, (8, 8)), np.ones((32, 32)))
    return DensePosePoints(x * 256, y * 256, charts, u, v, torch.from_numpy(parts.astype(np.uint8)))


def bit_masks(polygons: list[list[np.ndarray]], size: tuple[int, int]) -> torch.Tensor:
    """Of G objects, bool (G, height, width)."""
    from pycocotools import mask as coco_mask

    rles = [coco_mask.merge(coco_mask.frPyObjects(parts, *size)) for parts in polygons]
    return torch.from_numpy(np.stack([coco_mask.decode(rle) for rle in rles])).bool()


def summarise(quantities: dict[str, list[torch.Tensor]]) -> dict[str, list[float]]:
    """{quantity: [count, x.x, x.cos(i), x.cos(i * i)]} of the numbers x_i of all its tensors."""
    found = {}
    for name, tensors in quantities.items():
        values = torch.cat([t.flatten().double() for t in tensors]).numpy()
        i = np.arange(len(values), dtype=np.float64)
        products = (values @ values, values @ np.cos(i), values @ np.cos(i * i % 1000))
        found[name] = [len(values), *(float(f"{p:.8g}") for p in products)]
    return found


def record_experiment(name: str, probe_class, load_config) -> dict[str, list[float]]:
    """By either engine."""
    path = str(CONFIGS / f"{name}.yaml")
    chosen = options(load_config(path).MODEL.RESNETS.DEPTH)
    cfg = load_config(path, chosen)
    probe = probe_class(path, chosen)
    fill(probe.model)
    if cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]:
        fold_deviation(probe.model)
    return summarise(probe.quantities(items(cfg), seed=0))


def fold_deviation(model: torch.nn.Module) -> None:
    """As in MSRA's weights: their first layer divides by what the input is not divided by."""
    for name, value in model.state_dict().items():
        if name.endswith("stem.conv1.weight"):
            value.div_(58)


def record() -> dict[str, dict]:
    from moco_det.plugin import load_config
    from moco_det.plugin.probe import Probe

    return {name: record_experiment(name, Probe, load_config) for name in experiments()}


if __name__ == "__main__":
    write("experiments", record())
