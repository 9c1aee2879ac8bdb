"""Names of data sets: what they stand for, and what is said of those that stand for none."""

import pytest

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset


def test_missing_root_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(UserError) as error:
        get_dataset("voc_2007_test")
    assert f"expected {tmp_path}/VOC2007/JPEGImages" in str(error.value)
    assert "set DETECTRON2_DATASETS" in str(error.value)
    with pytest.raises(UserError, match="expected .*coco/annotations/instances_train2017.json"):
        get_dataset("coco_2017_train")


def test_default_root_is_datasets(tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected datasets/VOC2012/JPEGImages"):
        get_dataset("voc_2012_val")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("voc_2007_tset", "the nearest name is voc_2007_test; own data: voc:ROOT:SPLIT"),
        ("voc:only", "is written voc:ROOT:SPLIT"),
        ("yolo:a:b", "is written voc:ROOT:SPLIT"),
        ("voc:nowhere:train", "expected nowhere/JPEGImages, which does not exist"),
        ("coco:nowhere.json:images", "expected nowhere.json, which does not exist"),
    ],
)
def test_unusable_name_says_why(name, message):
    with pytest.raises(UserError, match=message):
        get_dataset(name)
