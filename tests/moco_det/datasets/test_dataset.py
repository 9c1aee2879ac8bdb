"""What all data sets share: mirrored keypoints, files that must exist, sizes of images."""

import pytest
from PIL import Image

from moco_det.common.errors import UserError
from moco_det.common.images import image_size
from moco_det.datasets import BUILT_IN, KINDS, Dataset
from moco_det.datasets.dataset import require


def test_keypoints_that_change_places_are_told_by_their_names():
    names = ("nose", "right_eye", "left_eye", "left_ear", "left_right_toe", "right_right_toe")
    dataset = Dataset("a", (), keypoint_names=names)
    assert dataset.keypoint_flips == (
        ("left_eye", "right_eye"),
        ("left_right_toe", "right_right_toe"),
    )
    assert Dataset("a", ()).keypoint_flips == ()


def test_the_first_missing_file_is_named(tmp_path):
    there, first, second = (tmp_path / name for name in ("there", "first", "second"))
    there.touch()
    require("a", [there], None)
    with pytest.raises(UserError) as error:
        require("a", [there, first, second], None)
    assert str(error.value) == f"dataset a: expected {first}, which does not exist"
    with pytest.raises(UserError, match=r"DETECTRON2_DATASETS to the folder .*, now /data$"):
        require("a", [first], "/data")


def test_size_is_height_and_width(tmp_path):
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    assert image_size(tmp_path / "a.png") == (40, 50)
    (tmp_path / "a.png").write_bytes(b"no image")
    for name in ("a.png", "absent.png"):
        with pytest.raises(UserError, match=f"cannot read image .*{name}"):
            image_size(tmp_path / name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_what_its_names_are(kind):
    """Built-in ones have a kind and the two parts of its form, too."""
    assert len(KINDS[kind].form.split(":")) == 2
    locations = [built_in.location.split(":") for built_in in BUILT_IN.values()]
    assert {len(parts) for parts in locations} == {3}
    assert kind in {parts[0] for parts in locations} <= KINDS.keys()
