"""Record what Detectron2's COCO evaluator makes of random masks and keypoints.

    PYTHONPATH=DETECTRON2 python tests/golden/record_coco_shapes.py

Coordinates are quarters of pixels, which float32 and float64 hold alike, and scores all differ.
Objects are ellipses, as polygons or, crowds, as runs; keypoints lie about them.
"""

import numpy as np
from pycocotools import mask as coco_mask
from recording import as_instances, coco_metadata, evaluate, write

CATEGORIES = {3: "finch", 8: "heron"}  # ids with gaps, as COCO's
IMAGES, SIDE = 12, 200
KEYPOINTS = ("beak", "left_wing", "right_wing", "tail")
SIGMAS = (0.05, 0.09, 0.09, 0.12)  # of COCO's there are 17


def quarters(values):
    return np.round(np.asarray(values) * 4) / 4


def ellipse(x, y, w, h):
    """Its pixels (SIDE, SIDE) uint8 in COCO's order."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    inside = ((columns - x) / w) ** 2 + ((rows - y) / h) ** 2 < 0.25
    return np.asfortranarray(inside, dtype=np.uint8)


def polygon(x, y, w, h):
    angles = np.arange(12) * np.pi / 6
    points = np.stack([x + w / 2 * np.cos(angles), y + h / 2 * np.sin(angles)], axis=1)
    return [quarters(points).ravel().tolist()]


def draw_case():
    """A COCO file's content, and detections {"image_id", "boxes", "scores", ...} as arrays."""
    random = np.random.RandomState(0)
    annotations, rows = [], []
    for image in range(IMAGES):
        for _ in range(random.randint(0, 4)):
            label, shape = random.randint(2), [*random.uniform(30, 170, 2), *sides(random)]
            points = quarters(random.uniform(-20, 20, (4, 2)) + shape[:2])
            annotations.append(_annotation(random, image, label, shape, points))
            for _ in range(random.randint(0, 3)):
                noisy = np.array(shape) + random.normal(0, 3, 4)
                rows.append((image, label, noisy, points + random.normal(0, 3, (4, 2))))
        if random.rand() < 0.5:
            shape = [*random.uniform(30, 170, 2), *sides(random)]
            rows.append((image, random.randint(2), shape, random.uniform(0, 200, (4, 2))))
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    images = [{"id": i, "file_name": f"{i}.jpg", "height": SIDE, "width": SIDE} for i in range(12)]
    fields = {"keypoints": list(KEYPOINTS), "skeleton": []}
    categories = [{"id": i, "name": name, **fields} for i, name in CATEGORIES.items()]
    content = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    return content, _detections(random, rows)


def sides(random):
    return random.uniform(10, 60, 2) if random.rand() < 0.5 else random.uniform(60, 180, 2)


def _annotation(random, image, label, shape, points):
    x, y, w, h = shape
    mask = ellipse(*shape)
    crowd = int(random.rand() < 0.15)
    runs = coco_mask.encode(mask)
    visibility = random.randint(0, 3, 4)
    return {
        "image_id": image,
        "category_id": list(CATEGORIES)[label],
        "bbox": quarters([x - w / 2, y - h / 2, w, h]).tolist(),
        "segmentation": {**runs, "counts": runs["counts"].decode()} if crowd else polygon(*shape),
        "area": int(mask.sum()),
        "iscrowd": crowd,
        "keypoints": np.hstack([points, visibility[:, None]]).ravel().tolist(),
        "num_keypoints": int((visibility > 0).sum()),
    }


def _detections(random, rows):
    scores = (random.permutation(len(rows)) + 1) / 256  # exact in float32
    found = []
    for image in range(IMAGES):
        mine = [(row, score) for row, score in zip(rows, scores, strict=True) if row[0] == image]
        boxes = [
            [x - w / 2, y - h / 2, x + w / 2, y + h / 2] for (_, _, (x, y, w, h), _), _ in mine
        ]
        points = [np.hstack([quarters(points), np.ones((4, 1))]) for (*_, points), _ in mine]
        found.append(
            {
                "image_id": image,
                "boxes": quarters(boxes).reshape(-1, 4),
                "scores": np.array([score for _, score in mine]),
                "classes": np.array([row[1] for row, _ in mine], dtype=np.int64),
                "masks": np.array([ellipse(*row[2]) for row, _ in mine], dtype=bool).reshape(
                    -1, SIDE, SIDE
                ),
                "keypoints": np.array(points).reshape(-1, 4, 3),
            }
        )
    return found


def record():
    from detectron2.evaluation import COCOEvaluator

    content, detections = draw_case()
    with coco_metadata(content) as name:
        evaluator = COCOEvaluator(
            name, distributed=False, use_fast_impl=False, kpt_oks_sigmas=list(SIGMAS)
        )
    inputs = [{"image_id": found["image_id"]} for found in detections]
    outputs = [{"instances": as_instances(found)} for found in detections]
    results = evaluate(evaluator, inputs, outputs)
    return {task: results[task] for task in ("segm", "keypoints")}


if __name__ == "__main__":
    write("coco_shapes", record())
