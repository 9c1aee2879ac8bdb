"""The drawn scenes with the annotations of every task: boxes, masks, keypoints, label maps.

    images/train/<class>/*.jpg        close-ups for pretraining, see `synthetic.images`
    scenes/                           VOC layout: boxes, and label maps in SegmentationClass/
    scenes/instances_{train,test}.json    the same objects in COCO's format, with polygons
    hearts/{train,test}/*.jpg         scenes that hold hearts alone
    hearts/keypoints_{train,test}.json    COCO's format, four keypoints on each heart

Objects are larger and fewer than in the scenes of `synthetic.images`: the networks that learn these
are a quarter as wide. A heart turns in the plane but is never mirrored, so that its left and right
are its own.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from moco_det.benchmark.synthetic import images
from moco_det.benchmark.synthetic.images import CLASSES, Scene

OBJECTS = {"radius": (22, 38), "most_objects": 3}  # of one scene
HEART = CLASSES.index("dotted_heart")
# Name -> corner of the heart's outline.
KEYPOINTS = {"notch": 0, "left_lobe": 36, "right_lobe": 12, "tip": 24}
SKELETON = [[1, 2], [2, 4], [4, 3], [3, 1]]  # numbers of keypoints, from 1


def draw_hearts(split: str, seed: int, count: int) -> Iterator[Scene]:
    """Scenes of one to three hearts; the first n are the same whatever `count` is."""
    for index in range(count):
        rng = images.generator(seed, f"hearts/{split}", index)
        hearts = int(rng.integers(1, OBJECTS["most_objects"] + 1))
        radii = rng.uniform(*OBJECTS["radius"], hearts).tolist()
        yield images.draw_scene(rng, [HEART] * hearts, radii)


def coco_annotations(
    scenes: Iterable[Scene], file_names: Iterable[str], classes: tuple[int, ...], keypoints: bool
) -> dict[str, Any]:
    """A COCO instances file; `classes` are those that become categories 1, 2, ...

    Polygons are in COCO's continuous coordinates, where a pixel's centre lies at a half, keypoints
    in its pixel indices.
    """
    categories = [{"id": i, "name": CLASSES[c]} for i, c in enumerate(classes, start=1)]
    if keypoints:
        categories = [c | {"keypoints": list(KEYPOINTS), "skeleton": SKELETON} for c in categories]
    pictures, annotations = [], []
    for image_id, (scene, name) in enumerate(zip(scenes, file_names, strict=True), start=1):
        height, width = scene.image.shape[:2]
        pictures.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for class_, mask, outline in zip(scene.classes, scene.masks, scene.outlines, strict=True):
            x0, y0, x1, y1 = images.tight_box(mask)
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": classes.index(class_) + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": [np.round(outline + 0.5, 2).ravel().tolist()],
            }
            if keypoints:
                points = np.round(outline[list(KEYPOINTS.values())], 2).tolist()
                annotation |= {"keypoints": [n for x, y in points for n in (x, y, 2)]}
                annotation["num_keypoints"] = len(points)
            annotations.append(annotation)
    return {"images": pictures, "annotations": annotations, "categories": categories}


def label_map(scene: Scene) -> np.ndarray:
    """uint8 (H, W): 0 for the background, class + 1 elsewhere, as in PASCAL VOC."""
    labels = np.zeros(scene.image.shape[:2], np.uint8)
    for index, mask in zip(scene.classes, scene.masks, strict=True):
        labels[mask] = index + 1
    return labels


def write_scenes(root: Path, split: str, seed: int, count: int) -> None:
    """Write `root`/scenes with boxes, masks and label maps."""
    scenes = images.write_voc_scenes(root, split, seed, count, **OBJECTS)
    folder = Path(root) / "scenes"
    names, every = [f"{name}.jpg" for name in scenes], tuple(range(len(CLASSES)))
    content = coco_annotations(scenes.values(), names, every, keypoints=False)
    (folder / f"instances_{split}.json").write_text(json.dumps(content))
    for sub in ("SegmentationClass", "ImageSets/Segmentation"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for name, scene in scenes.items():
        cv2.imwrite(str(folder / "SegmentationClass" / f"{name}.png"), label_map(scene))
    (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(scenes) + "\n")


def write_hearts(root: Path, split: str, seed: int, count: int) -> None:
    """Write `root`/hearts with keypoints."""
    scenes, folder = list(draw_hearts(split, seed, count)), Path(root) / "hearts"
    (folder / split).mkdir(parents=True, exist_ok=True)
    names = [f"{index:05d}.jpg" for index in range(count)]
    for name, scene in zip(names, scenes, strict=True):
        images.write_jpeg(folder / split / name, scene.image)
    content = coco_annotations(scenes, names, (HEART,), keypoints=True)
    (folder / f"keypoints_{split}.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a data set with annotations of every task.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-images", type=int, default=60, help="per class, for MoCo")
    parser.add_argument("--train-scenes", type=int, default=120, help="of each kind")
    parser.add_argument("--test-scenes", type=int, default=40, help="of each kind")
    args = parser.parse_args()
    cv2.setNumThreads(1)  # on images this small, handing work to threads costs more than the work
    images.write_image_folder(args.output, "train", args.seed, args.train_images)
    for split, count in (("train", args.train_scenes), ("test", args.test_scenes)):
        write_scenes(args.output, split, args.seed, count)
        write_hearts(args.output, split, args.seed, count)
    close_ups, scenes = len(CLASSES) * args.train_images, args.train_scenes + args.test_scenes
    print(f"drew {close_ups} close-ups, {scenes} scenes and {scenes} scenes of hearts", flush=True)


if __name__ == "__main__":
    main()
