"""Cityscapes' instances against a slow reading of their maps, and Detectron2's."""

import os

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from record_cityscapes_ap import CLASSES, LABELS, lend_names, write_case

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset
from moco_det.datasets.cityscapes import LABEL_IDS, run_lengths

IMAGE = "aachen_000000_000019"


def draw_map():
    """Two cars, one with a hole and in two pieces; a group; a bus at the edges; other labels."""
    numbers = np.full((30, 40), 7, dtype=np.uint16)
    numbers[5:15, 3:20] = 26001
    numbers[8:10, 5:8] = 7
    numbers[20:22, 30] = 26001
    numbers[16, 16] = 26002
    numbers[0:3, 0:4] = 24
    numbers[25:30, 35:40] = 28000
    numbers[17:19, 0:9] = 29003  # a caravan, which is not evaluated
    return numbers


@pytest.fixture
def root(tmp_path):
    write_case(tmp_path, {IMAGE: draw_map()}, "train")
    return tmp_path


def test_record(root):
    dataset = get_dataset(f"cityscapes:{root}:train")
    assert dataset.evaluator == "cityscapes"
    assert dataset.classes == CLASSES
    assert tuple(LABEL_IDS.values()) == LABELS
    (record,) = dataset.records()
    annotations = record.pop("annotations")
    assert record == {
        "file_name": f"{root}/leftImg8bit/train/aachen/{IMAGE}_leftImg8bit.png",
        "image_id": IMAGE,
        "height": 30,
        "width": 40,
    }
    assert [(a["category_id"], a["iscrowd"], a["bbox"]) for a in annotations] == [
        (0, 1, [0, 0, 4, 3]),
        (2, 0, [3, 5, 31, 22]),
        (2, 0, [16, 16, 17, 17]),
        (4, 0, [35, 25, 40, 30]),
    ]
    for annotation, number in zip(annotations, (24, 26001, 26002, 28000), strict=True):
        mask = coco_mask.decode(annotation["segmentation"])
        np.testing.assert_array_equal(mask, draw_map() == number)


def test_labels_are_those_of_the_official_package():
    helpers = pytest.importorskip("cityscapesscripts.helpers.labels")
    found = [x for x in helpers.labels if x.hasInstances and not x.ignoreInEval]
    assert [(x.name, x.id) for x in found] == list(LABEL_IDS.items())
    assert [x.trainId for x in found] == sorted(x.trainId for x in found)


def test_run_lengths_of_random_maps():
    random = np.random.RandomState(0)
    for _ in range(20):
        numbers = random.randint(0, 3, random.randint(1, 9, 2)).astype(np.uint16)
        for number, counts in run_lengths(numbers).items():
            values = np.arange(len(counts)) % 2
            flat = np.repeat(values, counts)
            np.testing.assert_array_equal(flat, numbers.ravel(order="F") == number)


def test_builtin_name_below_the_root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    name = "cityscapes_fine_instance_seg_val"
    message = "expected .*cityscapes/leftImg8bit/val, .*set DETECTRON2_DATASETS"
    with pytest.raises(UserError, match=message):
        get_dataset(name)
    write_case(tmp_path / "cityscapes", {IMAGE: draw_map()}, "val")
    assert get_dataset(name).records()[0]["image_id"] == IMAGE


def test_what_lacks_its_counterpart_is_named(root):
    dataset = get_dataset(f"cityscapes:{root}:train")
    other = root / "leftImg8bit" / "train" / "aachen" / "aachen_000001_000019_leftImg8bit.png"
    other.touch()
    expected = "gtFine/train/aachen/aachen_000001_000019_gtFine_instanceIds.png"
    message = f"1 images have no label map, the first is {other}: expected .*{expected}"
    with pytest.raises(UserError, match=message):
        dataset.records()
    other.unlink()
    photograph = other.with_name(f"{IMAGE}_leftImg8bit.png")
    photograph.unlink()
    with pytest.raises(UserError, match=f"1 label maps .*instanceIds.png: expected {photograph}"):
        dataset.records()
    next(root.glob("gtFine/*/*/*.png")).unlink()
    with pytest.raises(UserError, match=r"no CITY/\*_gtFine_instanceIds.png in .*gtFine/train"):
        dataset.records()


def test_a_split_that_is_absent_is_named(root):
    with pytest.raises(UserError, match="expected .*leftImg8bit/val, which does not exist"):
        get_dataset(f"cityscapes:{root}:val")


def test_an_unusable_map_is_named(root):
    path = next(root.glob("gtFine/*/*/*.png"))
    whole, dataset = path.read_bytes(), get_dataset(f"cityscapes:{root}:train")
    for content in (whole[: len(whole) // 2], b"", b"GIF89a" + bytes(30)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read the label map {path}"):
            dataset.records()
    Image.fromarray(draw_map().astype(np.uint8)).save(path)
    with pytest.raises(UserError, match="is of Pillow's mode L: .* 16 bits"):
        dataset.records()
    Image.fromarray(np.full((30, 40), 34005, dtype=np.uint16)).save(path)
    with pytest.raises(UserError, match="holds the number 34005, which is of label 34"):
        dataset.records()


def test_records_are_new_every_time_and_follow_the_file(root):
    dataset = get_dataset(f"cityscapes:{root}:train")
    for annotation in dataset.records()[0]["annotations"]:
        annotation.pop("segmentation")["size"][0] = 0  # as training does, and worse
    assert dataset.records()[0]["annotations"][0]["segmentation"]["size"] == [30, 40]
    path = next(root.glob("gtFine/*/*/*.png"))
    Image.fromarray(np.full((30, 40), 33000, dtype=np.uint16)).save(path)
    os.utime(path, (1, 1))
    (annotation,) = dataset.records()[0]["annotations"]
    assert annotation["bbox"] == [0, 0, 40, 30]


def test_real_maps_against_a_mask_for_each_number(shared_data):
    root = shared_data("cityscapes_sample")
    records = get_dataset(f"cityscapes:{root}:train").records()
    assert len(records) == 4
    record = records[2]  # the one with a group
    folder = root / "gtFine" / "train" / "aachen"
    numbers = np.array(Image.open(folder / f"{record['image_id']}_gtFine_instanceIds.png"))
    expected = []
    for number in np.unique(numbers):
        label = int(number // 1000 if number >= 1000 else number)
        if label in LABELS:
            rows, columns = np.nonzero(numbers == number)
            corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            expected.append((LABELS.index(label), int(number < 1000), corners, len(rows)))
    assert [
        (a["category_id"], a["iscrowd"], a["bbox"], coco_mask.area(a["segmentation"]))
        for a in record["annotations"]
    ] == expected
    assert sum(crowd for _, crowd, _, _ in expected) == 1


def test_equal_to_detectron2s_from_the_maps(shared_data):
    """Those boxes end where the last pixel begins, and objects one pixel thin are left out."""
    loader = pytest.importorskip("detectron2.data.datasets.cityscapes")
    pytest.importorskip("cityscapesscripts")
    lend_names()
    root = shared_data("cityscapes_sample")
    compared = 0
    for record in get_dataset(f"cityscapes:{root}:train").records():
        folder = root / "gtFine" / "train" / "aachen"
        path = folder / f"{record['image_id']}_gtFine_instanceIds.png"
        files = (record["file_name"], str(path), "", "")
        theirs = loader._cityscapes_files_to_dict(files, from_json=False, to_polygons=False)
        assert (theirs["height"], theirs["width"]) == (record["height"], record["width"])
        thick = [
            a for a in record["annotations"] if min(np.subtract(a["bbox"][2:], a["bbox"][:2])) > 1
        ]
        for ours, their in zip(thick, theirs["annotations"], strict=True):
            x0, y0, x1, y1 = their["bbox"]
            assert ours["bbox"] == [x0, y0, x1 + 1, y1 + 1]
            assert LABELS[ours["category_id"]] == their["category_id"]
            assert ours["iscrowd"] == their["iscrowd"]
            np.testing.assert_array_equal(
                coco_mask.decode(ours["segmentation"]), coco_mask.decode(their["segmentation"])
            )
            compared += 1
    assert compared > 20
