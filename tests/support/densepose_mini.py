"""A small dense pose data set in COCO's format, made of what is published without a registration.

    python tests/support/densepose_mini.py SOURCE FOLDER

SOURCE holds, of facebookresearch/DensePose: `demo_dp_single_ann.pkl`, the annotated points of one
person with the crop of a photograph; `example_results.json`, a model's results on three
photographs of COCO; and these in `images`. FOLDER gets `annotations.json` and the four images.

Of the results those that the model was sure of, but for very small ones, stand for annotations:
points are drawn from the body's pixels, and `dp_masks` are the charts, put together to parts. The
real annotation has points only, so its masks are what is near them.
"""

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from moco_det.densepose.points import decode_iuv

POINTS = 120  # of an object, if it has so many pixels
SURE = 0.5  # score
SMALL = 32  # pixels; thinner boxes are of feet at the edge of a photograph
NEAR = 20.0  # of a point, in box coordinates
# Part of the coarse segmentation for each chart: torso, right and left hand, left and right foot,
# upper and lower legs, upper and lower arms, head.
PART_OF_CHART = np.array(
    [0, 1, 1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 8, 9, 10, 11, 10, 11, 12, 13, 12, 13, 14, 14]
)
PERSON = {"id": 1, "name": "person", "supercategory": "person"}


def write_densepose_mini(source: Path, folder: Path) -> Path:
    """The path of the annotation file; images lie beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = [(0, real_annotation(source, folder))]
    for result in json.loads((source / "example_results.json").read_text()):
        if result["score"] >= SURE and min(result["bbox"][2:]) >= SMALL:
            objects.append((result["image_id"], annotation_of(result)))
    for path in sorted((source / "images").glob("*.jpg")):
        shutil.copyfile(path, folder / path.name)
    images = [_image(path) for path in sorted(folder.glob("*.[jp][pn]g"))]
    annotations = [
        {"id": number, "image_id": image_id, "category_id": 1, "iscrowd": 0, **fields}
        for number, (image_id, fields) in enumerate(objects, start=1)
    ]
    content = {"images": images, "annotations": annotations, "categories": [PERSON]}
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def _image(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        width, height = image.size
    return {"id": int(path.stem), "file_name": path.name, "width": width, "height": height}


def annotation_of(result: dict[str, Any]) -> dict[str, Any]:
    """Points and masks from the surface that a model found in a box."""
    surface = decode_iuv(result)
    charts = surface[0]
    height, width = charts.shape
    rows, columns = np.nonzero(charts)
    random = np.random.RandomState(len(rows))
    chosen = random.permutation(len(rows))[:POINTS]
    rows, columns = rows[chosen], columns[chosen]
    found = surface[:, rows, columns]
    points = {
        "dp_x": (columns + 0.5) * 256 / width,
        "dp_y": (rows + 0.5) * 256 / height,
        "dp_I": found[0].astype(float),
        "dp_U": found[1] / 255,
        "dp_V": found[2] / 255,
    }
    at = (np.arange(256) + 0.5) / 256
    stretched = charts[np.ix_((at * height).astype(int), (at * width).astype(int))]
    return _fields(result["bbox"], points, PART_OF_CHART[stretched])


def real_annotation(source: Path, folder: Path) -> dict[str, Any]:
    """The demonstration's annotation; its crop becomes the image 0, all of which is the box."""
    with (source / "demo_dp_single_ann.pkl").open("rb") as file:
        demo = pickle.load(file, encoding="latin1")
    crop = demo["ICrop"]
    Image.fromarray(crop).save(folder / "000000000000.png")
    height, width = crop.shape[:2]
    x, y = demo["x"] * 256 / width, demo["y"] * 256 / height
    points = {"dp_x": x, "dp_y": y, **{f"dp_{key}": demo[key] for key in "IUV"}}
    at = np.arange(256) + 0.5
    distance = np.hypot(at[:, None, None] - y, at[None, :, None] - x)
    parts = PART_OF_CHART[demo["I"].astype(int)][distance.argmin(axis=2)]
    return _fields([0, 0, width, height], points, parts * (distance.min(axis=2) < NEAR))


def _fields(box: list[float], points: dict[str, np.ndarray], parts: np.ndarray) -> dict[str, Any]:
    masks = []
    for part in range(1, 15):
        shape = coco_mask.encode(np.asfortranarray(parts == part, dtype=np.uint8))
        present = (parts == part).any()
        masks.append({**shape, "counts": shape["counts"].decode("ascii")} if present else [])
    numbers = {name: values.tolist() for name, values in points.items()}
    return {"bbox": box, "area": box[2] * box[3], "dp_masks": masks, **numbers}


if __name__ == "__main__":
    print(write_densepose_mini(Path(sys.argv[1]), Path(sys.argv[2])))
