"""The doctor on healthy sets, and on sets that were broken in a known way."""

import json

import pytest
from examined import CONFIGS, doctor, problems
from PIL import Image
from tiny_voc import write_tiny_voc

from moco_det.common.errors import UserError
from moco_det.config.loading import load_config
from moco_det.dataset_doctor import describe, examine


@pytest.fixture
def voc(tmp_path):
    return write_tiny_voc(tmp_path / "voc")


def test_classes_that_do_not_fit(voc):
    (report,) = doctor(f"voc:{voc}:train").values()  # the model has 80
    ((check, text),) = problems(report)
    assert check == "classes"
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 80" in text
    (report,) = doctor(f"voc:{voc}:train", config="voc_R50_FCN16_30k_moco").values()
    assert "has objects" in problems(report)[0][1]


def test_masks_asked_of_voc(voc):
    opts = ("MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.MASK_ON", True)
    (report,) = doctor(f"voc:{voc}:train", None, *opts).values()
    assert [check for check, _ in problems(report)] == ["mask"]


def test_train_and_test_with_other_classes(voc, tmp_path):
    other = write_tiny_voc(tmp_path / "other")
    for path in (other / "Annotations").iterdir():
        path.write_text(path.read_text().replace("square", "triangle"))
    reports = doctor(f"voc:{voc}:train", f"voc:{other}:test", "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    first, second = reports.values()
    assert first.problems == []
    assert "not those of" in problems(second)[0][1]


def test_missing_official_set_is_reported_with_its_source(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    reports = doctor("voc_2007_trainval", "voc_2007_test", "MODEL.ROI_HEADS.NUM_CLASSES", 20)
    assert [len(report.problems) for report in reports.values()] == [3, 3]
    for report, file in zip(reports.values(), ("trainval_06-Nov", "test_06-Nov"), strict=True):
        assert {check for check, _ in problems(report)} == {"layout"}
        assert f"VOC{file}-2007.tar" in report.remedy
        assert f"{tmp_path}/VOC2007" in report.remedy


def test_own_set_has_no_remedy(tmp_path):
    (report,) = doctor(f"voc:{tmp_path}/nowhere:train").values()
    assert len(report.problems) == 3
    assert report.remedy == ""
    assert "download" not in describe(report, 0)


def test_official_count_and_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_tiny_voc(tmp_path / "VOC2007")
    report = doctor("voc_2007_test")["voc_2007_test"]
    found = problems(report)
    assert ("count", "4 images; the official set has 4,952") in found
    assert sum("not one of VOC's 20 classes" in text for _, text in found) == 4


def test_lvis_of_another_version(tmp_path):
    path = tmp_path / "annotations.json"
    categories = [{"id": i, "name": str(i), "frequency": "f"} for i in range(1, 1204)]
    image = {"id": 1, "coco_url": "x/train2017/1.jpg", "height": 30, "width": 40}
    content = {"images": [image], "annotations": [], "categories": categories}
    path.write_text(json.dumps(content))
    Image.new("RGB", (40, 30)).save(tmp_path / "1.jpg")
    found = problems(doctor(f"lvis:{path}:{tmp_path}").popitem()[1])
    assert [check for check, _ in found] == ["version"]
    assert "LVIS v1" in found[0][1]


def test_config_without_data_sets():
    with pytest.raises(UserError, match="DATASETS.TRAIN and DATASETS.TEST are empty"):
        examine(load_config(CONFIGS / "Base-RCNN-FPN-BN.yaml"), None)


def test_sample_is_decoded_and_the_rest_is_looked_for(voc):
    for name in ("000", "001"):  # their headers are whole
        path = voc / f"JPEGImages/{name}.jpg"
        path.write_bytes(path.read_bytes()[:700])
    (voc / "JPEGImages/002.jpg").unlink()
    name = f"voc:{voc}:train"
    report = doctor(name, None, "MODEL.ROI_HEADS.NUM_CLASSES", 2, limit=2)[name]
    assert report.decoded == 2
    assert sum("cannot be decoded" in text for _, text in problems(report)) == 1
    assert sum("does not exist" in text for _, text in problems(report)) == 1


def test_real_sets(shared_data):
    bccd = shared_data("bccd_voc") / "BCCD"
    three = ("MODEL.ROI_HEADS.NUM_CLASSES", 3)
    train, test = doctor(f"voc:{bccd}:train", f"voc:{bccd}:trainval", *three, limit=20).values()
    assert (train.images, test.images) == (205, 292)
    assert problems(train) == problems(test) == []
    coco = shared_data("coco_mini")
    for split in ("train", "val"):
        for kind, run in (("instances", "1x"), ("person_keypoints", "keypoint_2x")):
            name = f"coco:{coco}/annotations/{kind}_{split}2017.json:{coco}/{split}2017"
            report = doctor(name, config=f"coco_R50_FPN_{run}_moco", limit=5)[name]
            assert (problems(report), report.images) == ([], 40)
    lvis = shared_data("lvis_v0.5_val100")
    name = f"lvis:{lvis}/lvis_val_10_with_images.json:{lvis}/val2017_10images"
    report = doctor(name, config="lvis_R50_FPN_1x_moco")[name]
    assert (problems(report), report.objects) == ([], 68)
