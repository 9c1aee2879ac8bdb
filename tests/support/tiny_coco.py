"""A file of COCO's format with two images, two classes, and two objects on each image."""

import json
from pathlib import Path

from PIL import Image

BOXES = ((5, 8, 30, 40), (60, 20, 40, 60))


def tiny_coco() -> dict:
    """The content: polygons, three keypoints for each object; ids from 1."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 96, "width": 128} for i in (1, 2)]
    names = {"keypoints": ["a", "b", "c"], "skeleton": [[1, 2], [2, 3]]}
    annotations = [
        {
            "image_id": image["id"],
            "category_id": category,
            "bbox": [x, y, w, h],
            "area": w * h,
            "iscrowd": 0,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            "keypoints": [x, y, 2, x + 5, y, 1, 0, 0, 0],
        }
        for image in images
        for category, (x, y, w, h) in enumerate(BOXES, start=1)
    ]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    categories = [{"id": i, "name": name, **names} for i, name in ((1, "red"), (2, "green"))]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_tiny_coco(folder: Path, content: dict) -> str:
    """Write the images and the file; the name of the data set."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in (1, 2):
        Image.new("RGB", (128, 96)).save(folder / f"{number}.jpg")
    (folder / "a.json").write_text(json.dumps(content))
    return f"coco:{folder}/a.json:{folder}"
