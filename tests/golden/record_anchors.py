"""Record Detectron2's anchors on small feature maps.

PYTHONPATH=DETECTRON2 python tests/golden/record_anchors.py
"""

import torch
from recording import write

# Sizes and aspect ratios as in MODEL.ANCHOR_GENERATOR; stride and (height, width) of each map.
CASES = {
    "C4": {
        "sizes": [[32, 64, 128, 256, 512]],
        "aspect_ratios": [[0.5, 1.0, 2.0]],
        "strides": [16],
        "maps": [(2, 3)],
    },
    "FPN": {
        "sizes": [[32], [64], [128], [256], [512]],
        "aspect_ratios": [[0.5, 1.0, 2.0]],
        "strides": [4, 8, 16, 32, 64],
        "maps": [(3, 4), (2, 2), (1, 2), (1, 1), (1, 1)],
    },
}


def feature_maps(case):
    return [torch.zeros(1, 1, height, width) for height, width in CASES[case]["maps"]]


def record():
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_anchor_generator

    tables = {}
    for case, options in CASES.items():
        cfg = get_cfg()
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = options["sizes"]
        cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = options["aspect_ratios"]
        shapes = [ShapeSpec(stride=stride) for stride in options["strides"]]
        anchors = build_anchor_generator(cfg, shapes)(feature_maps(case))
        tables[case] = [boxes.tensor.tolist() for boxes in anchors]
    return tables


if __name__ == "__main__":
    write("anchors", record())
