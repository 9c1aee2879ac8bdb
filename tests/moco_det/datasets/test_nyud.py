"""NYU Depth v2's folder: its two data sets, and what is missing in one line."""

import numpy as np
import pytest
from examined import doctor, problems
from PIL import Image
from tiny_nyud import BOX, FLOOR, SIZE, WALL, write_tiny_nyud

from moco_det.common.errors import UserError
from moco_det.datasets import BUILT_IN, get_dataset
from moco_det.datasets.semantic import IGNORED


@pytest.fixture
def root(tmp_path):
    return write_tiny_nyud(tmp_path / "NYUD_MT")


def test_label_0_is_void_and_label_1_the_first_class(root):
    dataset = get_dataset(f"nyud_sem_seg:{root}:train")
    assert len(dataset.classes) == 40
    assert [dataset.classes[i - 1] for i in (WALL, FLOOR, BOX)] == ["wall", "floor", "box"]
    first, *others = dataset.records()
    assert len(others) == 2
    assert (first["image_id"], first["height"], first["width"]) == ("0001", *SIZE)
    file = np.asarray(Image.open(root / "segmentation/0001.png"))
    labels = dataset.read_map(first)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, np.where(file == 0, IGNORED, file.astype(int) - 1))
    file = np.where(file == WALL, 41, file).astype(np.uint8)
    Image.fromarray(file).save(root / "segmentation/0001.png")
    with pytest.raises(UserError, match=r"0001.png holds the label 41, .* 40 classes \(1 to 40"):
        dataset.read_map(first)


def test_depths_are_read_in_metres(root):
    dataset = get_dataset(f"nyud_depth:{root}:train")
    assert dataset.classes == ()
    for i, record in enumerate(dataset.records()):
        depths = dataset.read_map(record)
        assert np.array_equal(depths, np.load(root / f"depth/000{i + 1}.npy"))
        assert (depths[:, :2] == 0).all()


def test_built_in_sets_lie_below_the_data_root(root, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for task in ("sem_seg", "depth"):
        assert len(get_dataset(f"nyud_v2_{task}_train").records()) == 3
        with pytest.raises(UserError, match=rf"nyud_v2_{task}_val: expected .*gt_sets/val.txt"):
            get_dataset(f"nyud_v2_{task}_val")
        count = {split: BUILT_IN[f"nyud_v2_{task}_{split}"].images for split in ("train", "val")}
        assert count == {"train": 795, "val": 654}  # of the 1,449 that NYU has labelled
        assert sum(count.values()) == 1449


def test_missing_files_are_named(root):
    (root / "depth/0002.npy").unlink()
    with pytest.raises(UserError, match=r"train.txt lists 0002, but there is no .*depth/0002.npy"):
        get_dataset(f"nyud_depth:{root}:train").records()
    assert len(get_dataset(f"nyud_sem_seg:{root}:train").records()) == 3
    (root / "images/0003.jpg").unlink()
    with pytest.raises(UserError, match=r"lists 0003, but there is no .*images/0003.jpg"):
        get_dataset(f"nyud_sem_seg:{root}:train").records()
    (root / "gt_sets/train.txt").write_text("\n")
    with pytest.raises(UserError, match=r"no image in .*, split train"):
        get_dataset(f"nyud_depth:{root}:train").records()


DEPTH = ("MODEL.META_ARCHITECTURE", "DepthEstimator", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 1)


def test_the_doctor_lists_all_that_is_wrong(root, tmp_path, monkeypatch):
    name = f"nyud_depth:{root}:train"
    (report,) = doctor(name, None, *DEPTH).values()
    assert problems(report) == []
    assert (report.images, report.decoded, report.classes) == (3, 3, 0)
    np.save(root / "depth/0001.npy", np.full(SIZE, -1.0))
    np.save(root / "depth/0002.npy", np.ones((4, 4)))
    (report,) = doctor(name, None, *DEPTH).values()
    assert [(kind, "000" in text) for kind, text in problems(report)] == [("depth", True)] * 2
    (report,) = doctor(name).values()
    assert any(
        "has depth maps, but MODEL.META_ARCHITECTURE" in text for _, text in problems(report)
    )
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (report,) = doctor("nyud_v2_depth_train", None, *DEPTH).values()
    assert ("count", "3 images; the official set has 795") in problems(report)
    assert "NYUD_MT.tgz" in report.remedy
