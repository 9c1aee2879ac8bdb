"""Record what Detectron2's VOC evaluation makes of a random case.

    PYTHONPATH=DETECTRON2 python tests/golden/record_voc_ap.py

Objects are [image, class, difficult, xmin, ymin, xmax, ymax] in VOC's inclusive pixels. Detections
are [image, class, score, x0, y0, x1, y1] in continuous pixels, as a detector gives them; their
scores have three decimals and differ, and their coordinates one, which is what Detectron2's text
files keep.
"""

import tempfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from recording import write

CLASSES, IMAGES = ("disc", "ring", "star"), 40
THRESHOLDS = [percent / 100 for percent in range(50, 100, 5)]


def draw_case(rng):
    """Objects, some difficult; up to two noisy detections of each; false ones elsewhere."""
    objects, boxes = [], []
    for image in range(IMAGES):
        for _ in range(rng.randint(0, 6)):
            label, (x, y), (w, h) = rng.randint(3), rng.randint(1, 150, 2), rng.randint(20, 100, 2)
            difficult = int(rng.rand() < 0.25)
            corners = [int(v) for v in (x, y, x + w, y + h)]
            objects.append([image, int(label), difficult, *corners])
            for _ in range(rng.randint(0, 3)):
                noisy = np.array([x - 1, y - 1, x + w, y + h]) + rng.normal(0, 6, 4)
                boxes.append([image, int(label), *noisy])
        for _ in range(rng.randint(0, 4)):
            x, y, w, h = rng.uniform(10, 90, 4)
            boxes.append([image, int(rng.randint(3)), x, y, x + w, y + h])
    scores = rng.permutation(999)[: len(boxes)] + 1
    detections = [
        [image, label, int(score) / 1000, *(round(float(v), 1) for v in box)]
        for (image, label, *box), score in zip(boxes, scores, strict=True)
    ]
    return objects, detections


def write_annotations(objects, folder):
    for image in range(IMAGES):
        root = ElementTree.Element("annotation")
        for _, label, difficult, *corners in (o for o in objects if o[0] == image):
            node = ElementTree.SubElement(root, "object")
            fields = {"name": CLASSES[label], "pose": "", "truncated": 0, "difficult": difficult}
            for key, value in fields.items():
                ElementTree.SubElement(node, key).text = str(value)
            box = ElementTree.SubElement(node, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                ElementTree.SubElement(box, key).text = str(value)
        ElementTree.ElementTree(root).write(folder / f"{image}.xml")


def detectron2_aps(objects, detections, eleven_point):
    """(classes, thresholds) AP in percent."""
    from detectron2.evaluation.pascal_voc_evaluation import voc_eval

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_annotations(objects, folder)
        (folder / "split.txt").write_text("\n".join(map(str, range(IMAGES))))
        for label, class_name in enumerate(CLASSES):
            lines = [
                f"{image} {score:.3f} {x0 + 1:.1f} {y0 + 1:.1f} {x1:.1f} {y1:.1f}"
                for image, other, score, x0, y0, x1, y1 in detections
                if other == label
            ]
            (folder / f"{class_name}.txt").write_text("\n".join(lines))
        paths = f"{folder}/{{}}.txt", f"{folder}/{{}}.xml", f"{folder}/split.txt"
        return [
            [100 * float(voc_eval(*paths, c, t, eleven_point)[2]) for t in THRESHOLDS]
            for c in CLASSES
        ]


def record():
    objects, detections = draw_case(np.random.RandomState(0))
    return {
        "classes": CLASSES,
        "images": IMAGES,
        "objects": objects,
        "detections": detections,
        "eleven_point": detectron2_aps(objects, detections, True),
        "area": detectron2_aps(objects, detections, False),
    }


if __name__ == "__main__":
    write("voc_ap", record())
