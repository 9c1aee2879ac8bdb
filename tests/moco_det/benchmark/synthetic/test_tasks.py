"""The drawn annotations against the drawn pixels, and through the project's own readers."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from moco_det.benchmark.synthetic import tasks
from moco_det.benchmark.synthetic.images import CLASSES, draw_scenes
from moco_det.datasets import get_dataset, read_labels


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    tasks.write_scenes(folder, "test", seed=1, count=5)
    tasks.write_hearts(folder, "test", seed=1, count=4)
    return folder


@pytest.fixture(scope="module")
def scenes():
    return list(draw_scenes("test", 1, 5, **tasks.OBJECTS))


def test_polygons_cover_the_drawn_pixels(root, scenes):
    dataset = get_dataset(f"coco:{root}/scenes/instances_test.json:{root}/scenes/JPEGImages")
    assert dataset.classes == CLASSES
    for record, scene in zip(dataset.records(), scenes, strict=True):
        assert [a["category_id"] for a in record["annotations"]] == scene.classes
        for annotation, mask in zip(record["annotations"], scene.masks, strict=True):
            shapes = coco_mask.frPyObjects(annotation["segmentation"], *mask.shape)
            polygon = coco_mask.decode(coco_mask.merge(shapes)).astype(bool)
            # OpenCV fills the pixels of the outline as well, about half a pixel all around.
            assert (polygon & ~mask).sum() <= 0.02 * mask.sum()
            assert (polygon & mask).sum() > 0.8 * mask.sum()
            x0, y0, x1, y1 = annotation["bbox"]
            rows, columns = np.nonzero(mask)
            assert (x0, y0, x1, y1) == (
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            )


def test_boxes_of_both_formats_are_the_same(root):
    voc = get_dataset(f"voc:{root}/scenes:test").records()
    coco = get_dataset(f"coco:{root}/scenes/instances_test.json:{root}/scenes/JPEGImages").records()
    for one, two in zip(voc, coco, strict=True):
        assert [a["bbox"] for a in one["annotations"]] == [a["bbox"] for a in two["annotations"]]


def test_label_maps_are_the_masks(root, scenes):
    records = get_dataset(f"voc_sem_seg:{root}/scenes:test").records()
    for record, scene in zip(records, scenes, strict=True):
        labels = read_labels(record, 1 + len(CLASSES))
        for index, mask in zip(scene.classes, scene.masks, strict=True):
            assert (labels[mask] == index + 1).all()
        assert (labels[~np.any(scene.masks, axis=0)] == 0).all()


def test_keypoints_are_the_hearts_corners(root):
    dataset = get_dataset(f"coco:{root}/hearts/keypoints_test.json:{root}/hearts/test")
    assert dataset.keypoint_names == ("notch", "left_lobe", "right_lobe", "tip")
    assert dataset.keypoint_flips == (("left_lobe", "right_lobe"),)
    scenes = list(tasks.draw_hearts("test", 1, 4))
    for record, scene in zip(dataset.records(), scenes, strict=True):
        for annotation, mask in zip(record["annotations"], scene.masks, strict=True):
            points = np.array(annotation["keypoints"]).reshape(-1, 3)
            assert (points[:, 2] == 2).all()
            notch, left, right, tip = points[:, :2]
            # The axis runs from the notch to the tip; seen along it, in an image whose y points
            # down, what is called left lies to the left: the cross product tells the side.
            axis = tip - notch
            sides = [np.cross([*axis, 0], [*(p - notch), 0])[2] for p in (left, right)]
            assert sides[0] > 0 > sides[1]
            # The tip is as far out as the outline goes, and so on the mask or next to it.
            near = mask[max(0, int(tip[1]) - 2) : int(tip[1]) + 3, max(0, int(tip[0]) - 2) :]
            assert near[:, :5].any()


def test_the_first_images_do_not_depend_on_how_many_there_are():
    few, many = list(tasks.draw_hearts("train", 0, 2)), list(tasks.draw_hearts("train", 0, 3))
    for one, two in zip(few, many, strict=False):
        np.testing.assert_array_equal(one.image, two.image)


def test_annotations_are_plain_json(root):
    content = json.loads((root / "hearts/keypoints_test.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["dotted_heart"]
    assert all(a["num_keypoints"] == 4 for a in content["annotations"])
