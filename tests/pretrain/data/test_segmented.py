"""VOC's segmentation split: what is read, and what is wrong with it in a line."""

import numpy as np
import pytest
from PIL import Image
from tiny_voc_segments import write_tiny_segments

from moco_det.common.errors import UserError
from pretrain.data.segmented import find_segmented


@pytest.fixture
def root(tmp_path):
    return write_tiny_segments(tmp_path / "VOCdevkit" / "VOC2012")


def test_images_are_found_in_the_devkit_as_well(root):
    names = [image.name for image in find_segmented(root, "train")]
    assert names == ["train_0", "train_1", "train_2"]
    assert find_segmented(root.parents[1], "train") == find_segmented(root, "train")


def test_pixels_and_labels_are_stretched_alike(root):
    pixels, labels = find_segmented(root, "val")[0].read(32)
    assert (pixels.shape, labels.shape) == ((32, 32, 3), (32, 32))
    assert set(np.unique(labels)) <= {0, 7, 12, 15, 255}


def test_train_aug_has_a_folder_of_its_own(root):
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    lines = "".join(f"/JPEGImages/train_{i}.jpg /SegmentationClassAug/x.png\n" for i in range(2))
    (root / "ImageSets/Segmentation/train_aug.txt").write_text(lines)
    found = find_segmented(root, "train_aug")
    assert [image.labels.parent.name for image in found] == ["SegmentationClassAug"] * 2
    assert [image.name for image in found] == ["train_0", "train_1"]


def test_lists_have_what_editors_add_and_no_image_twice(root):
    path = root / "ImageSets/Segmentation/val.txt"
    path.write_bytes("\ufeffval_1\r\n\r\nval_0 \r\n".encode())
    assert [image.name for image in find_segmented(root, "val")] == ["val_1", "val_0"]
    path.write_text("val_0\nval_1\nval_0\n")  # whose segments would count twice
    with pytest.raises(UserError, match="val.txt lists val_0 2 times: keep one of the lines"):
        find_segmented(root, "val")


def test_what_is_missing_is_named(root):
    with pytest.raises(
        UserError, match="no list .*train_aug.txt: download VOCtrainval_11-May-2012"
    ):
        find_segmented(root, "train_aug")
    (root / "SegmentationClass/val_1.png").unlink()
    with pytest.raises(
        UserError, match="lists val_1, but there is no .*SegmentationClass/val_1.png"
    ):
        find_segmented(root, "val")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(UserError, match="lists no image"):
        find_segmented(root, "val")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((60, 80), 21, np.uint8), "holds the label 21: VOC has 0 to 20"),
        (np.zeros((10, 10), np.uint8), "is 10x10 pixels, its image .* 80x60"),
        (np.zeros((60, 80, 3), np.uint8), "mode RGB: .* classes themselves, not colours"),
    ],
)
def test_labels_that_are_no_classes_are_refused(root, labels, message):
    Image.fromarray(labels).save(root / "SegmentationClass/val_0.png")
    with pytest.raises(UserError, match=message):
        find_segmented(root, "val")[0].read(32)
