"""Record what Detectron2's Cityscapes instance evaluator makes of a random case.

    PYTHONPATH=DETECTRON2 python tests/golden/record_cityscapes_ap.py

Objects, groups and void are ellipses painted over one another in maps of instance ids.
"""

import sys
import tempfile
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
from PIL import Image
from record_coco_shapes import SIDE, ellipse, sides
from recording import as_instances, evaluate, write

CLASSES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
LABELS = (24, 25, 26, 27, 28, 31, 32, 33)
USED = (0, 2, 7)  # of the classes
IMAGES = 5


def draw_case():
    """Maps (SIDE, SIDE) uint16 by image id, and detections {"image_id", "masks", ...}."""
    random = np.random.RandomState(0)
    maps, shapes = {}, []
    for image in (f"aachen_{number:06d}_000019" for number in range(IMAGES)):
        numbers = maps[image] = np.full((SIDE, SIDE), 7, dtype=np.uint16)  # road
        for n in range(8):
            label, shape = USED[random.randint(3)], [*random.uniform(30, 170, 2), *sides(random)]
            kind = random.rand()  # void, a group, or an object
            number = 1 if kind < 0.1 else LABELS[label] if kind < 0.3 else LABELS[label] * 1000 + n
            numbers[ellipse(*shape).astype(bool)] = number
            for _ in range(random.randint(0, 3)):
                shapes.append((image, label, np.array(shape) + random.normal(0, 3, 4)))
    return maps, _detections(random, shapes, maps)


def _detections(random, shapes, maps):
    scores = (random.permutation(len(shapes)) + 1) / 256  # exact in float32
    found = []
    for image in maps:
        mine = [index for index, row in enumerate(shapes) if row[0] == image]
        masks = [ellipse(*shapes[index][2]) for index in mine]
        found.append(
            {
                "image_id": image,
                "boxes": np.zeros((len(mine), 4)),  # which nobody looks at
                "scores": scores[mine],
                "classes": np.array([shapes[index][1] for index in mine], dtype=np.int64),
                "masks": np.array(masks, dtype=bool).reshape(-1, SIDE, SIDE),
            }
        )
    return found


def write_case(root, maps, split="val"):
    """Cityscapes' layout below `root`, with photographs that are empty files."""
    for image, numbers in maps.items():
        photograph = root / "leftImg8bit" / split / "aachen" / f"{image}_leftImg8bit.png"
        labels = root / "gtFine" / split / "aachen" / f"{image}_gtFine_instanceIds.png"
        for path in (photograph, labels):
            path.parent.mkdir(parents=True, exist_ok=True)
        photograph.touch()
        Image.fromarray(numbers).save(labels)


def lend_names():
    """cityscapesscripts under the name, not public, that Detectron2 imports it by; and it."""
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as tool
    import cityscapesscripts.helpers.labels  # noqa: F401

    parts = ("deeplearning", "deeplearning.projects", "deeplearning.projects.cityscapesApi")
    for name in parts:
        sys.modules.setdefault(name, ModuleType(name))
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "cityscapesscripts":
            sys.modules[f"{parts[-1]}.{name}"] = module
    return tool


def record():
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import CityscapesInstanceEvaluator

    from moco_det.evaluation.official import old_numpy

    tool = lend_names()
    maps, detections = draw_case()
    # Without these the package stops: at np.in1d, and at NumPy's integers in files it writes.
    written = mock.patch.object(tool, "writeDict2JSON")
    with tempfile.TemporaryDirectory() as folder, old_numpy(tool), written:
        write_case(Path(folder), maps)
        metadata = MetadataCatalog.get("golden")
        metadata.set(thing_classes=list(CLASSES), gt_dir=f"{folder}/gtFine/val")
        evaluator = CityscapesInstanceEvaluator("golden")
        MetadataCatalog.remove("golden")
        inputs = [{"file_name": f"{found['image_id']}_leftImg8bit.png"} for found in detections]
        outputs = [{"instances": as_instances(found)} for found in detections]
        return evaluate(evaluator, inputs, outputs)


if __name__ == "__main__":
    write("cityscapes_ap", record())
