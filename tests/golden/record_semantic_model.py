"""Record what Detectron2's SemanticSegmentor computes with the plugin's head.

    PYTHONPATH=DETECTRON2 python tests/golden/record_semantic_model.py

Detectron2 has no head of its kind. Weights come from numpy's RandomState: `fill` of `record_model`
sets them.
"""

import numpy as np
import torch
from record_model import fill, images
from recording import write

# FCN-16s at a small width.
OPTIONS = """
MODEL.DEVICE cpu MODEL.META_ARCHITECTURE SemanticSegmentor MODEL.RESNETS.OUT_FEATURES ['res5']
MODEL.RESNETS.RES5_DILATION 2 MODEL.RESNETS.STRIDE_IN_1X1 False MODEL.RESNETS.NORM SyncBN
MODEL.RESNETS.WIDTH_PER_GROUP 16 MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.BACKBONE.FREEZE_AT 0
MODEL.SEM_SEG_HEAD.NAME FCN16Head MODEL.SEM_SEG_HEAD.IN_FEATURES ['res5']
MODEL.SEM_SEG_HEAD.COMMON_STRIDE 16 MODEL.SEM_SEG_HEAD.CONVS_DIM 16 MODEL.SEM_SEG_HEAD.NORM SyncBN
MODEL.SEM_SEG_HEAD.NUM_CLASSES 4 MODEL.SEM_SEG_HEAD.LOSS_WEIGHT 0.5
MODEL.PIXEL_STD [57.375,57.12,58.395]
"""
ORIGINAL = [(192, 256), (45, 35)]
GRID = 29  # every so many pixels a score is recorded


def label_maps(seed=0):
    """Of `images`: blocks of the labels 0 to 3, and of 255."""
    random = np.random.RandomState(seed)
    choices = np.array([0, 1, 2, 3, 255])
    maps = []
    for image in images():
        h, w = image.shape[1:]
        coarse = choices[random.randint(0, 5, (h // 10 + 1, w // 10 + 1))]
        maps.append(torch.from_numpy(np.kron(coarse, np.ones((10, 10), int))[:h, :w]))
    return maps


def batch():
    return [
        {"image": image, "sem_seg": labels, "height": h, "width": w}
        for image, labels, (h, w) in zip(images(), label_maps(), ORIGINAL, strict=True)
    ]


def summarise(losses, found):
    """Losses, and of each image the size of its scores and some of them."""
    scores = [x["sem_seg"] for x in found]
    return {
        "losses": {name: float(value) for name, value in losses.items()},
        "shapes": [list(x.shape) for x in scores],
        "scores": [np.round(x[:, ::GRID, ::GRID].double().numpy(), 6).tolist() for x in scores],
    }


def record():
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    import moco_det.plugin  # noqa: F401 (registers the head)

    cfg = get_cfg()
    cfg.merge_from_list(OPTIONS.split())
    model = build_model(cfg)
    fill(model)
    with torch.no_grad(), EventStorage():
        found = model.eval()(batch())
        return {"segmentor": summarise(model.train()(batch()), found)}


if __name__ == "__main__":
    write("semantic_model", record())
