"""The drawn data set: repeatable, balanced, boxes exact to the pixel, brightness no clue."""

import collections
import xml.etree.ElementTree as ElementTree

import cv2
import numpy as np
import pytest

from moco_det.benchmark.synthetic import images


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    images.write_image_folder(root, "train", seed=3, per_class=4)
    images.write_voc_scenes(root, "train", seed=3, count=16)
    images.write_voc_scenes(root, "test", seed=3, count=4)
    return root


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def parsed(annotation):
    """[(class name, (xmin, ymin, xmax, ymax))] as written, 1-based inclusive."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [
        (node.findtext("name"), tuple(int(node.findtext(f"bndbox/{c}")) for c in corners))
        for node in ElementTree.parse(annotation).iter("object")
    ]


def test_same_seed_same_bytes_other_seed_other_bytes(drawn, tmp_path):
    for seed, folder in ((3, "again"), (4, "other")):
        images.write_image_folder(tmp_path / folder, "train", seed, per_class=4)
        images.write_voc_scenes(tmp_path / folder, "train", seed, count=16)
        images.write_voc_scenes(tmp_path / folder, "test", seed, count=4)
    assert contents(tmp_path / "again") == contents(drawn)
    other = contents(tmp_path / "other")
    names = [name for name in contents(drawn) if name.endswith(".jpg")]
    assert len(names) == 8 * 4 + 16 + 4
    assert all(other[name] != contents(drawn)[name] for name in names)


def test_a_longer_split_starts_with_the_shorter_one():
    short, long = images.draw_scenes("test", 0, 3), images.draw_scenes("test", 0, 6)
    for a, b in zip(short, long, strict=False):
        np.testing.assert_array_equal(a.image, b.image)


def test_splits_share_no_image(drawn):
    found = [p.read_bytes() for p in drawn.rglob("*.jpg")]
    assert len(set(found)) == len(found)


def test_written_boxes_are_the_extent_of_the_drawn_masks(drawn):
    for index, scene in enumerate(images.draw_scenes("train", 3, 16)):
        written = parsed(drawn / f"scenes/Annotations/train_{index:05d}.xml")
        assert [name for name, _ in written] == [images.CLASSES[c] for c in scene.classes]
        for (_, box), mask in zip(written, scene.masks, strict=True):
            rows, columns = np.nonzero(mask)
            expected = (columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1)
            assert box == expected


@pytest.mark.parametrize("class_index", range(8))
def test_mask_is_where_the_drawing_changes_the_image(class_index):
    """Oracle: the same canvas before and after; only anti-aliased edges may lie outside."""
    rng = np.random.default_rng(class_index)
    look = images.LOOKS[images.CLASSES[class_index]]
    free = np.ones((128, 128), bool)
    alpha, centre, pose, radius = images._place(rng, look.shape, 30, free)
    canvas = np.full((128, 128, 3), 7, np.uint8)
    images._fill(canvas, alpha, centre, pose, radius / 2, look, rng)
    changed = (canvas != 7).any(axis=2)
    mask = alpha >= 128
    ring = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    assert changed[mask].mean() > 0.99
    assert not changed[~ring].any()


def test_objects_do_not_cover_each_other_nor_touch_the_border():
    for scene in images.draw_scenes("train", 1, 30):
        assert 1 <= len(scene.masks) <= images.MAX_OBJECTS
        cover = np.sum(scene.masks, axis=0)
        assert cover.max() == 1
        assert not cover[[0, -1]].any()
        assert not cover[:, [0, -1]].any()


def test_classes_are_balanced(drawn):
    in_folders = collections.Counter(p.parent.name for p in drawn.glob("images/train/*/*.jpg"))
    assert in_folders == dict.fromkeys(images.CLASSES, 4)
    scenes = images.draw_scenes("train", 0, 100)
    counts = np.bincount([c for scene in scenes for c in scene.classes], minlength=8)
    assert counts.max() - counts.min() <= 1


def test_voc_layout(drawn):
    for split, count in (("train", 16), ("test", 4)):
        names = (drawn / f"scenes/ImageSets/Main/{split}.txt").read_text().split()
        assert len(set(names)) == count
        for name in names:
            image = cv2.imread(str(drawn / f"scenes/JPEGImages/{name}.jpg"))
            tree = ElementTree.parse(drawn / f"scenes/Annotations/{name}.xml")
            size = [int(tree.findtext(f"size/{k}")) for k in ("height", "width", "depth")]
            assert list(image.shape) == size


def test_hues_follow_the_conversion_of_opencv():
    rng = np.random.default_rng(0)
    hsv = rng.random((50, 3)).astype(np.float32)
    oracle = cv2.cvtColor(hsv[None] * np.float32([360, 1, 1]), cv2.COLOR_HSV2BGR)[0] * 255
    np.testing.assert_allclose(images._bgr(hsv[:, :1], hsv[:, 1:2], hsv[:, 2:]), oracle, atol=0.1)


def test_brightness_does_not_tell_the_class():
    """A nearest-centroid classifier on the object's brightness stays near chance (1 in 8)."""
    levels, labels = [], []
    for scene in images.draw_scenes("train", 0, 240):
        levels += [cv2.cvtColor(scene.image, cv2.COLOR_BGR2GRAY)[m].mean() for m in scene.masks]
        labels += scene.classes
    levels, labels = np.array(levels), np.array(labels)
    half = len(labels) // 2
    centroids = np.array([levels[:half][labels[:half] == c].mean() for c in range(8)])
    guesses = np.abs(levels[half:, None] - centroids).argmin(axis=1)
    assert (guesses == labels[half:]).mean() < 0.25


def test_an_object_that_finds_no_room_shrinks():
    rng = np.random.default_rng(0)
    scene = images.draw_scene(rng, [0, 1, 2, 3], [60.0] * 4)
    assert all(mask.sum() > 20 for mask in scene.masks)
    assert scene.masks[3].sum() < scene.masks[0].sum()
