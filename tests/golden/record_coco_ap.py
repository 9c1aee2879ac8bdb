"""Record what Detectron2's COCO evaluator makes of a random case.

    PYTHONPATH=DETECTRON2 python tests/golden/record_coco_ap.py

Coordinates are quarters of pixels, which float32 and float64 hold alike, and scores all differ.
"""

import numpy as np
from recording import coco_metadata, evaluate, write

CATEGORIES = {2: "disc", 5: "ring", 9: "star"}  # ids with gaps, as COCO's
IMAGES, SIDE = 20, 300


def _quarters(values):
    return (np.round(np.asarray(values) * 4) / 4).tolist()


def draw_case():
    """A COCO file's content, and detections [image, class, score, x0, y0, x1, y1]."""
    random = np.random.RandomState(0)
    annotations, boxes = [], []
    for image in range(IMAGES):
        for _ in range(random.randint(0, 6)):
            label = random.randint(3)
            x, y, w, h = _quarters([*random.uniform(0, 150, 2), *random.uniform(10, 150, 2)])
            crowd = int(random.rand() < 0.15)
            annotation = {"image_id": image, "category_id": list(CATEGORIES)[label]}
            annotation |= {"bbox": [x, y, w, h], "area": 0.7 * w * h, "iscrowd": crowd}
            annotations.append(annotation | {"id": len(annotations) + 1})
            for _ in range(random.randint(0, 3)):
                noisy = np.array([x, y, x + w, y + h]) + random.normal(0, 5, 4)
                boxes.append([image, label, *_quarters(noisy)])
        for _ in range(random.randint(0, 3)):
            x, y, w, h = random.uniform(10, 120, 4)
            boxes.append([image, random.randint(3), *_quarters([x, y, x + w, y + h])])
    scores = (random.permutation(len(boxes)) + 1) / 256  # exact in float32
    detections = [
        [image, label, float(score), *box]
        for (image, label, *box), score in zip(boxes, scores, strict=True)
    ]
    sizes = {"height": SIDE, "width": SIDE}
    images = [{"id": i, "file_name": f"{i}.jpg", **sizes} for i in range(IMAGES)]
    categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
    content = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    return content, detections


def instances(detections):
    import torch
    from detectron2.structures import Boxes, Instances

    rows = torch.tensor([row[1:] for row in detections], dtype=torch.float32).reshape(-1, 6)
    fields = {"pred_boxes": Boxes(rows[:, 2:]), "scores": rows[:, 1]}
    return Instances((SIDE, SIDE), pred_classes=rows[:, 0].long(), **fields)


def record():
    from detectron2.evaluation import COCOEvaluator

    content, detections = draw_case()
    with coco_metadata(content) as name:
        evaluator = COCOEvaluator(name, ("bbox",), distributed=False, use_fast_impl=False)
    inputs = [{"image_id": image} for image in range(IMAGES)]
    of_image = ([row for row in detections if row[0] == image] for image in range(IMAGES))
    return evaluate(evaluator, inputs, [{"instances": instances(rows)} for rows in of_image])


if __name__ == "__main__":
    write("coco_ap", record())
