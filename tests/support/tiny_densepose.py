"""Two drawn images with a person each, whose dense pose is annotated in the first only."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

BOX = [10.0, 8.0, 40.0, 48.0]  # XYWH


def write_tiny_densepose(folder: Path) -> str:
    """The name of the data set."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    images, annotations = [], []
    for number in (1, 2):
        pixels = np.kron(random.randint(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 64})
        person = {"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, "bbox": BOX}
        annotations.append(person | {"area": BOX[2] * BOX[3]})
    annotations[0] |= points(random)
    path = folder / "annotations.json"
    content = {"images": images, "annotations": annotations}
    path.write_text(json.dumps(content | {"categories": [{"id": 1, "name": "person"}]}))
    return f"densepose:{path}:{folder}"


def points(random: np.random.RandomState) -> dict:
    """Twenty points anywhere, and a torso over the left half of the box."""
    mask = np.zeros((256, 256), dtype=np.uint8, order="F")
    mask[:, :128] = 1
    shape = coco_mask.encode(mask)
    torso = {**shape, "counts": shape["counts"].decode("ascii")}
    found = {key: random.uniform(0, 256, 20).tolist() for key in ("dp_x", "dp_y")}
    found |= {key: random.uniform(0, 1, 20).tolist() for key in ("dp_U", "dp_V")}
    charts = random.randint(1, 25, 20).astype(float).tolist()
    return found | {"dp_I": charts, "dp_masks": [torso, *[[] for _ in range(13)]]}
