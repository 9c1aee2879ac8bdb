"""Record what Detectron2's transforms make of label maps, and what its SemSegEvaluator counts.

PYTHONPATH=DETECTRON2 python tests/golden/record_semantic.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from recording import evaluate, write

HEIGHT, WIDTH, CLASSES = 12, 18, 4
SCALE, CROP, MEAN = (0.5, 1.5), (14, 16), (123.675, 116.28, 103.53)
DRAWN = 12  # images


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
        *(round(total, 3) for total in (image * ramp).sum(dim=(1, 2)).tolist()),
    ]


def record_inputs():
    """Consecutive training inputs, drawn from numpy's global generator."""
    from detectron2.data import transforms as T

    from moco_det.plugin.frames import RandomScale
    from moco_det.plugin.pixel_data import SemanticDatasetMapper

    augmentations = [RandomScale(*SCALE), T.RandomFlip(), T.RandomCrop("absolute", CROP)]
    mapper = SemanticDatasetMapper(augmentations, "RGB", CLASSES, CROP, MEAN)
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


def metrics(pairs):
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
        maps = [torch.from_numpy(found).long() for found, _ in pairs]
        scores = [torch.nn.functional.one_hot(found, CLASSES).permute(2, 0, 1) for found in maps]
        results = evaluate(
            evaluator, [{"file_name": name} for name in names], [{"sem_seg": x} for x in scores]
        )["sem_seg"]
    DatasetCatalog.remove("golden")
    MetadataCatalog.remove("golden")
    kept = {k: float(v) for k, v in results.items() if "Boundary" not in k and "min(" not in k}
    return {name: None if np.isnan(value) else value for name, value in kept.items()}


def _golden_record(name):
    return {"file_name": name, "sem_seg_file_name": name}


def record():
    return {"inputs": record_inputs(), "metrics": metrics(evaluated_maps())}


if __name__ == "__main__":
    write("semantic", record())
