"""The table of built-in data sets against the data set modules and the sets' own arithmetic."""

import json

import pytest
from examined import doctor

from moco_det.common.errors import UserError
from moco_det.dataset_doctor import Report
from moco_det.datasets import BUILT_IN, get_dataset, locate

NAMES = sorted(BUILT_IN)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_layout_is_what_the_data_set_asks_for(name, root):
    """Once all that the doctor misses is there, the data set opens; it misses nothing else."""
    (report,) = doctor(name).values()
    missing = [text.removesuffix(" does not exist") for check, text in report.problems]
    assert missing
    with pytest.raises(UserError) as error:
        get_dataset(name)
    assert any(path in str(error.value) for path in (*missing, str(root / "coco")))
    for text in missing:
        create(root / text)
    if name.startswith("lvis"):
        create(root / "coco" / ("val2017" if "val" in name else "train2017"))
    assert get_dataset(name).name == name


def create(path):
    """An empty folder or file, or annotations of no image."""
    if not path.suffix or ".5" in path.suffix:
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = [{"id": i, "name": str(i), "frequency": "f"} for i in range(1, 1231)]
    content = {"images": [], "annotations": [], "categories": categories}
    path.write_text(json.dumps(content) if path.suffix == ".json" else "")


def test_counts_add_up():
    count = {name: official.images for name, official in BUILT_IN.items()}
    for year in (2007, 2012):
        parts = count[f"voc_{year}_train"] + count[f"voc_{year}_val"]
        assert count[f"voc_{year}_trainval"] == parts
    assert (
        count["coco_2014_minival"] + count["coco_2014_valminusminival"] == (count["coco_2014_val"])
    )
    # In 2017 COCO moved all of its 2014 images but 5,000 into train.
    assert count["coco_2014_train"] + count["coco_2014_val"] == (
        count["coco_2017_train"] + count["coco_2017_val"]
    )
    sem_seg = {name: count[f"voc_2012_sem_seg_{name}"] for name in ("train", "val", "trainval")}
    assert sem_seg["train"] + sem_seg["val"] == sem_seg["trainval"]
    # Appendix A.5 of MoCo v1 gives these two.
    assert count["voc_2012_sem_seg_train_aug"] == 10582
    assert count["cityscapes_fine_sem_seg_train"] == 2975


@pytest.mark.parametrize("name", NAMES)
def test_remedy_names_files_and_the_place_below_the_data_root(name, root):
    text = Report(name, BUILT_IN[name]).remedy
    assert str(root) in text
    assert text.startswith("download ")
    for source in BUILT_IN[name].sources:
        assert source.site in text
        assert all(file in text for file in source.files)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("voc_2007_trainvl", "the nearest name is voc_2007_trainval"),
        ("lvis_v1_val", "only LVIS v0.5"),
        ("voc:folder", "a data set of one's own is written voc:ROOT:SPLIT"),
        ("imagenet:folder:train", "a data set of one's own is written"),
    ],
)
def test_wrong_name(name, message):
    with pytest.raises(UserError, match=message):
        locate(name)
