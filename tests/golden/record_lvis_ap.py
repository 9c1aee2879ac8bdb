"""Record what Detectron2's LVIS evaluator makes of a random case.

    PYTHONPATH=DETECTRON2 python tests/golden/record_lvis_ap.py

Objects are ellipses of four of the 1,230 classes. Of the others, some are known to be absent from
an image, and some that are there are not annotated exhaustively.
"""

from unittest.mock import patch

import numpy as np
from record_coco_shapes import SIDE, ellipse, polygon, quarters, sides
from recording import as_instances, coco_metadata, evaluate, write

USED = {4: "r", 30: "c", 700: "f", 1230: "f"}  # category id -> frequency
IMAGES = 8


def draw_case():
    """An LVIS file's content, and detections {"image_id", "boxes", "scores", ...} as arrays."""
    random = np.random.RandomState(0)
    used = list(USED)
    annotations, rows, images = [], [], []
    for image in range(1, IMAGES + 1):
        for _ in range(random.randint(1, 5)):
            category, shape = used[random.randint(4)], [*random.uniform(30, 170, 2), *sides(random)]
            annotations.append(_annotation(image, category, shape))
            for _ in range(random.randint(0, 3)):
                rows.append((image, category - 1, np.array(shape) + random.normal(0, 3, 4)))
        for _ in range(4):
            shape = [*random.uniform(30, 170, 2), *sides(random)]
            rows.append((image, used[random.randint(4)] - 1, shape))
        present = {a["category_id"] for a in annotations if a["image_id"] == image}
        images.append(_image(random, image, present, used))
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    categories = [
        {"id": i, "name": f"thing {i}", "frequency": USED.get(i, "f")} for i in range(1, 1231)
    ]
    content = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    return content, _detections(random, rows)


def _annotation(image, category, shape):
    x, y, w, h = shape
    return {
        "image_id": image,
        "category_id": category,
        "bbox": quarters([x - w / 2, y - h / 2, w, h]).tolist(),
        "segmentation": polygon(*shape),
        "area": int(ellipse(*shape).sum()),
    }


def _image(random, image, present, used):
    absent = [category for category in used if category not in present]
    return {
        "id": image,
        "file_name": f"COCO_val2014_{image:012d}.jpg",
        "coco_url": f"http://images.cocodataset.org/val2017/{image:012d}.jpg",
        "height": SIDE,
        "width": SIDE,
        "neg_category_ids": [category for category in absent if random.rand() < 0.5],
        "not_exhaustive_category_ids": [c for c in sorted(present) if random.rand() < 0.2],
    }


def _detections(random, rows):
    scores = (random.permutation(len(rows)) + 1) / 256  # exact in float32
    found = []
    for image in range(1, IMAGES + 1):
        mine = [index for index, row in enumerate(rows) if row[0] == image]
        shapes = np.array([rows[index][2] for index in mine])
        corners = np.hstack([shapes[:, :2] - shapes[:, 2:] / 2, shapes[:, :2] + shapes[:, 2:] / 2])
        found.append(
            {
                "image_id": image,
                "boxes": quarters(corners),
                "scores": scores[mine],
                "classes": np.array([rows[index][1] for index in mine]),
                "masks": np.array([ellipse(*shape) for shape in shapes], dtype=bool),
            }
        )
    return found


def record():
    from detectron2.evaluation import LVISEvaluator

    content, detections = draw_case()
    with coco_metadata(content) as name:
        evaluator = LVISEvaluator(name, distributed=False)
    inputs = [{"image_id": found["image_id"]} for found in detections]
    outputs = [{"instances": as_instances(found)} for found in detections]
    with patch.object(np, "float", float, create=True):  # without it, the package stops at np.float
        return evaluate(evaluator, inputs, outputs)


if __name__ == "__main__":
    write("lvis_ap", record())
