"""Record what Detectron2's data loading makes of images and annotations.

PYTHONPATH=DETECTRON2 python tests/golden/record_inputs.py
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from recording import write

HEIGHT, WIDTH = 12, 18
MIRRORED_KEYPOINTS = (0, 2, 1)  # a nose, a left and a right eye
# name -> (short edge, whether flipped, mask format)
CASES = {
    "shrunk": (8, False, "polygon"),
    "enlarged, flipped": (17, True, "polygon"),
    "shrunk, flipped, bit masks": (9, True, "bitmask"),
    "enlarged, bit masks": (15, False, "bitmask"),
}
MAX_SIZE = 24
# INPUT.MIN_SIZE_TRAIN, MAX_SIZE_TRAIN, MIN_SIZE_TRAIN_SAMPLING
DRAWS = [((8, 9, 12, 15), 20, "choice"), ((6, 30), 40, "range")]
DRAWN = 30


class NumpyDraws:
    """numpy's global generator, from which Detectron2 draws, with the names of `Generator`."""

    choice = staticmethod(np.random.choice)
    integers = staticmethod(np.random.randint)
    random = staticmethod(np.random.uniform)


def pixels():
    """RGB noise (HEIGHT, WIDTH, 3)."""
    return np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)


def run_lengths(mask):
    """A bool mask (HEIGHT, WIDTH) as COCO's uncompressed RLE: runs down the columns."""
    ends = np.flatnonzero(np.diff(mask.flatten("F"), prepend=False, append=False))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *ends, mask.size]).tolist()}


def annotations(mask_format):
    """Boxes as XYXY: two outlines, one in two parts, beyond the image, crowd, thin and outside."""
    objects = [
        ([2.0, 1.5, 9.25, 7.5], [[2.0, 1.5, 9.25, 3.0, 5.5, 7.5]], 2),
        ([1, 2, 16.5, 11], [[1, 2, 5, 2, 5.5, 6.25, 1, 6], [10, 4, 16.5, 5.5, 12, 11]], 0),
        ([12.0, 8.0, 22.0, 14.0], [[12.0, 8.0, 22.0, 8.5, 20.0, 14.0, 13.0, 13.5]], 1),
        ([0.0, 0.0, 18.0, 12.0], run_lengths(pixels()[..., 0] >= 0), 3),
        ([18.5, 2.0, 21.0, 5.0], [[18.5, 2.0, 21.0, 2.5, 20.0, 5.0]], 1),
        ([4.0, 4.0, 4.0, 9.0], [[4.0, 4.0, 4.25, 9.0, 4.0, 8.0]], 1),
    ]
    if mask_format == "bitmask":
        objects.append(([3.0, 2.0, 8.0, 9.0], run_lengths(pixels()[..., 0] > 127), 2))
        objects.append(([7.0, 7.0, 8.0, 8.0], run_lengths(pixels()[..., 0] < 0), 2))
    return [
        {
            "bbox": box,
            "category_id": label,
            "iscrowd": int(label == 3),
            "segmentation": segmentation,
            "keypoints": [
                *(box[0] + 0.5, box[1] + 0.5, 2),
                *(box[2] - 0.5, box[1] + 0.5, 1),
                *((box[2] - 0.5, box[3] + 0.5, 2) if label else (0.5, 0.5, 0)),
            ],
        }
        for box, segmentation, label in objects
    ]


def make_record(folder, mask_format):
    """The record of that image, which is written into `folder`. RLEs are compressed."""
    from pycocotools import mask as coco_mask

    path = str(Path(folder) / "image.png")
    Image.fromarray(pixels()).save(path)
    objects = annotations(mask_format)
    for thing in objects:
        if isinstance(thing["segmentation"], dict):
            thing["segmentation"] = coco_mask.frPyObjects(thing["segmentation"], HEIGHT, WIDTH)
    return {
        "file_name": path, "image_id": 0, "height": HEIGHT, "width": WIDTH, "annotations": objects
    }  # fmt: skip


def as_lists(masks):
    """Polygons as they are; a bit mask as text, a row a line."""
    if isinstance(masks, list):
        return [[polygon.tolist() for polygon in polygons] for polygons in masks]
    return [["".join(".#"[pixel] for pixel in row) for row in mask.tolist()] for mask in masks]


def record_case(short_edge, flip, mask_format):
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T
    from detectron2.structures import BoxMode

    mapper = DatasetMapper(
        True,
        augmentations=[T.ResizeShortestEdge(short_edge, MAX_SIZE), T.RandomFlip(float(flip))],
        image_format="BGR",
        use_instance_mask=True,
        use_keypoint=True,
        instance_mask_format=mask_format,
        keypoint_hflip_indices=MIRRORED_KEYPOINTS,
    )
    with tempfile.TemporaryDirectory() as folder:
        record = make_record(folder, mask_format)
        for thing in record["annotations"]:
            thing["bbox_mode"] = BoxMode.XYXY_ABS
        item = mapper(record)
    found = item["instances"]
    masks = found.gt_masks
    return {
        "image": item["image"].tolist(),
        "boxes": found.gt_boxes.tensor.tolist(),
        "classes": found.gt_classes.tolist(),
        "masks": as_lists(masks.polygons if mask_format == "polygon" else masks.tensor),
        "keypoints": found.gt_keypoints.tensor.tolist(),
    }


def record_draws(sizes, max_size, sampling):
    """[height, width, whether flipped] of consecutive images."""
    from detectron2.data import transforms as T

    augmentations = T.AugmentationList(
        [T.ResizeShortestEdge(sizes, max_size, sampling), T.RandomFlip()]
    )
    np.random.seed(0)
    drawn = []
    for _ in range(DRAWN):
        image = T.AugInput(pixels())
        flips = [isinstance(t, T.HFlipTransform) for t in augmentations(image).transforms]
        drawn.append([*image.image.shape[:2], any(flips)])
    return drawn


def record():
    cases = {name: record_case(*case) for name, case in CASES.items()}
    return {**cases, "draws": [record_draws(*draw) for draw in DRAWS]}


if __name__ == "__main__":
    write("inputs", record())
