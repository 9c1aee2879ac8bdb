"""Record what Detectron2's SemanticSegmentor, transforms and SemSegEvaluator compute.

    PYTHONPATH=DETECTRON2 python tests/golden/record_semantic.py

The head is the plugin's: Detectron2 has none of its kind. Weights come from numpy's RandomState, as
in `record_model`, whose `fill` sets them.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
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

HEIGHT, WIDTH, CLASSES = 12, 18, 4
SCALE, CROP, MEAN = (0.5, 1.5), (14, 16), (123.675, 116.28, 103.53)
DRAWN = 12  # images


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


def record_model():
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
        return summarise(model.train()(batch()), found)


def make_record(folder):
    """An image of noise and its label map, written into `folder`."""
    random = np.random.RandomState(1)
    pixels = random.randint(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    labels = np.array([0, 1, 2, 3, 255])[random.randint(0, 5, (HEIGHT, WIDTH))].astype(np.uint8)
    paths = [str(Path(folder) / name) for name in ("image.png", "labels.png")]
    for path, array in zip(paths, (pixels, labels), strict=True):
        Image.fromarray(array).save(path)
    record = {"image_id": "a", "height": HEIGHT, "width": WIDTH}
    return record | dict(zip(("file_name", "sem_seg_file_name"), paths, strict=True))


def as_rows(item):
    """The sizes that show what was drawn, and sums that show the rest."""
    image, labels = item["image"].double(), item["sem_seg"]
    ramp = torch.arange(labels.numel()).view(labels.shape) % 97 + 1  # tells a pixel's place
    return [
        str(item["image"].dtype).removeprefix("torch."),
        (labels != 255).sum().item(),
        (labels * ramp).sum().item(),
        *(image * ramp).sum(dim=(1, 2)).tolist(),
    ]


def record_inputs():
    """Consecutive training inputs, drawn from numpy's global generator."""
    from detectron2.data import transforms as T

    from moco_det.plugin.semantic_mapper import RandomScale, SemanticMapper

    augmentations = [RandomScale(*SCALE), T.RandomFlip(), T.RandomCrop("absolute", CROP)]
    mapper = SemanticMapper(augmentations, "RGB", CLASSES, CROP, MEAN)
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        record = make_record(folder)
        return [as_rows(mapper(record)) for _ in range(DRAWN)]


def evaluated_maps():
    """(found, true) label maps of three images: class 3 is never true, 255 is ignored."""
    random = np.random.RandomState(2)
    pairs = []
    for height, width in ((9, 11), (7, 5), (6, 6)):
        true = np.array([0, 1, 2, 255])[random.randint(0, 4, (height, width))]
        wrong = random.randint(0, CLASSES, (height, width))
        found = np.where((random.rand(height, width) < 0.6) & (true != 255), true, wrong)
        pairs.append((found.astype(np.uint8), true.astype(np.uint8)))
    return pairs


def evaluate(pairs):
    """SemSegEvaluator's metrics; those of the boundaries left out, NaN as None."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.evaluation import SemSegEvaluator

    with tempfile.TemporaryDirectory() as folder:
        names = [str(Path(folder) / f"{i}.png") for i in range(len(pairs))]
        for name, (_, true) in zip(names, pairs, strict=True):
            Image.fromarray(true).save(name)
        DatasetCatalog.register("golden", lambda: [_golden_record(name) for name in names])
        classes = [f"c{i}" for i in range(CLASSES)]
        MetadataCatalog.get("golden").set(stuff_classes=classes, ignore_label=255)
        evaluator = SemSegEvaluator("golden", distributed=False)
        evaluator.reset()
        for name, (found, _) in zip(names, pairs, strict=True):
            scores = torch.nn.functional.one_hot(torch.from_numpy(found).long(), CLASSES)
            evaluator.process([{"file_name": name}], [{"sem_seg": scores.permute(2, 0, 1)}])
        results = evaluator.evaluate()["sem_seg"]
    DatasetCatalog.remove("golden")
    MetadataCatalog.remove("golden")
    kept = {k: float(v) for k, v in results.items() if "Boundary" not in k and "min(" not in k}
    return {name: None if np.isnan(value) else value for name, value in kept.items()}


def _golden_record(name):
    return {"file_name": name, "sem_seg_file_name": name}


if __name__ == "__main__":
    write(
        "semantic",
        {
            "model": record_model(),
            "inputs": record_inputs(),
            "metrics": evaluate(evaluated_maps()),
        },
    )
