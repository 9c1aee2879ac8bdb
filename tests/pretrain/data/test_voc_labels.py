"""VOC's labels of images: from its lists, and by the same rule from XML."""

import numpy as np
import pytest
from PIL import Image

from moco_det.common.errors import UserError
from pretrain.data.voc_labels import find_voc

# Image -> (class, difficult) of its objects.
TRAIN = {"000": [("cat", 0), ("cat", 1)], "001": [("dog", 1)], "002": []}
TEST = {"003": [("dog", 0)], "004": [("cat", 1), ("dog", 1)]}
LABELS = [[[1, -1], [-1, 0], [-1, -1]], [[-1, 1], [0, 0]]]  # of cat and dog


def write_voc(root, lists):
    main = root / "ImageSets" / "Main"
    for folder in (main, root / "JPEGImages", root / "Annotations"):
        folder.mkdir(parents=True)
    for split, objects, labels in zip(("trainval", "test"), (TRAIN, TEST), LABELS, strict=True):
        for image, found in objects.items():
            Image.new("RGB", (8, 8)).save(root / "JPEGImages" / f"{image}.jpg")
            nodes = "".join(
                f"<object><name>{name}</name><difficult>{difficult}</difficult></object>"
                for name, difficult in found
            )
            (root / "Annotations" / f"{image}.xml").write_text(f"<annotation>{nodes}</annotation>")
        (main / f"{split}.txt").write_text("\n".join(objects))
        for column, name in enumerate(("cat", "dog") if lists else ()):
            lines = (f"{i} {row[column]:2d}\n" for i, row in zip(objects, labels, strict=True))
            (main / f"{name}_{split}.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("lists", [True, False], ids=["lists", "xml"])
@pytest.mark.parametrize("place", ["", "VOCdevkit/VOC2007"])
def test_a_label_is_present_absent_or_difficult(tmp_path, lists, place):
    root = write_voc(tmp_path / place, lists)
    classes, train, test = find_voc(tmp_path, "trainval", "test")
    assert classes == ["cat", "dog"]
    assert [split.labels.tolist() for split in (train, test)] == LABELS
    assert [train.images.file(i) for i in range(3)] == [
        str(root / f"JPEGImages/00{i}.jpg") for i in range(3)
    ]
    assert np.array_equal(train.images.labels, range(3))


def test_real_lists_of_images_without_class_lists(shared_data):
    root = shared_data("bccd_voc") / "BCCD"
    classes, train, test = find_voc(root, "trainval", "test")
    assert classes == ["Platelets", "RBC", "WBC"]
    assert (len(train.labels), len(test.labels)) == (292, 72)
    assert (train.labels == 1).any(axis=0).all()


def removed(root, name):
    (root / name).unlink()


def written(root, name, text):
    (root / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: removed(r, "ImageSets/Main/dog_test.txt"), r"lacks dog_test\.txt: unpack all"),
        (lambda r: written(r, "ImageSets/Main/dog_test.txt", "003 yes"),
            r"dog_test\.txt: a line is an image and 1, -1 or 0, not '003 yes'"),
        (lambda r: removed(r, "JPEGImages/004.jpg"), r"JPEGImages lacks 1 .*: 004\.jpg"),
        (lambda r: (r / "JPEGImages").rename(r / "Images"), "lacks the folder JPEGImages"),
        (lambda r: (r / "ImageSets").rename(r / "Lists"), r"no VOC in .*ImageSets/Main/.*VOCtest"),
        (lambda r: (r / "ImageSets/Main/dog_test.txt").write_bytes(b"\xff\xfe\x00"),
            "cannot read .*: it is no text"),
    ],
    ids=["list", "line", "image", "images", "none", "text"],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path, damage, message):
    damage(write_voc(tmp_path, lists=True))
    with pytest.raises(UserError, match=message):
        find_voc(tmp_path, "trainval", "test")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("Annotations/004.xml", "<annotation>", r"004\.xml is no XML"),
        ("Annotations/004.xml", "<a><object/></a>", "an <object> lacks a <name>"),
        ("ImageSets/Main/test.txt", "", "lists no image of test"),
    ],
)
def test_xml_that_says_nothing_is_named(tmp_path, name, text, message):
    written(write_voc(tmp_path, lists=False), name, text)
    with pytest.raises(UserError, match=message):
        find_voc(tmp_path, "trainval", "test")


def test_a_split_without_a_list_is_named(tmp_path):
    write_voc(tmp_path, lists=False)
    with pytest.raises(UserError, match=r"neither .*/val\.txt nor a CLASS_val\.txt"):
        find_voc(tmp_path, "trainval", "val")
