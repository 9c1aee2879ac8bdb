"""Label maps: layouts by hand, the official tables, and what is missing said by name."""

import numpy as np
import pytest
from PIL import Image
from tiny_semantic import COLOURS, save_palette, write_tiny_semantic

from moco_det.common.errors import UserError
from moco_det.datasets import (
    BUILT_IN,
    get_dataset,
    read_labels,
)
from moco_det.datasets.semantic import CITYSCAPES_LABEL_IDS
from moco_det.datasets.voc import VOC_CLASSES

STEMS = ("aachen/aachen_000000_000019", "bochum/bochum_000000_000313")


def write_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def cityscapes(tmp_path):
    """Two images of 4 x 6 pixels; the first has trainIds as well as labelIds."""
    root = tmp_path / "cityscapes"
    for number, stem in enumerate(STEMS):
        write_png(root / f"leftImg8bit/val/{stem}_leftImg8bit.png", np.zeros((4, 6, 3), np.uint8))
        label_ids = np.full((4, 6), (7, 33)[number], np.uint8)
        label_ids[0] = (0, 4, 29, 30, 34, 255)  # none of the 19 classes
        write_png(root / f"gtFine/val/{stem}_gtFine_labelIds.png", label_ids)
    train_ids = np.full((4, 6), 2, np.uint8)
    write_png(root / f"gtFine/val/{STEMS[0]}_gtFine_labelTrainIds.png", train_ids)
    return root


def test_voc_by_hand(tmp_path):
    root = write_tiny_semantic(tmp_path / "VOC2012", images=3)
    dataset = get_dataset(f"voc_sem_seg:{root}:train")
    assert dataset.classes == ("background", *VOC_CLASSES)
    assert (dataset.evaluator, len(dataset.classes)) == ("sem_seg", 21)
    records = dataset.records()
    assert records[2] == {
        "file_name": f"{root}/JPEGImages/002.jpg",
        "sem_seg_file_name": f"{root}/SegmentationClass/002.png",
        "image_id": "002",
        "height": 112,
        "width": 80,
    }
    labels = read_labels(records[0], 21)
    assert labels.dtype == np.uint8
    assert labels.shape == (96, 128)
    counts = dict(zip(*np.unique(labels, return_counts=True), strict=True))
    assert counts == {0: 96 * 128 - 54**2, min(COLOURS): 48**2, 255: 54**2 - 48**2}


def test_builtin_names_lie_below_the_root(tmp_path, monkeypatch, cityscapes):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_tiny_semantic(tmp_path / "VOC2012", images=3, split="val")
    assert len(get_dataset("voc_2012_sem_seg_val").records()) == 3
    assert len(get_dataset("cityscapes_fine_sem_seg_val").records()) == 2
    assert sum("sem_seg" in name for name in BUILT_IN) == 6 + 2  # NYUD's: test_nyud.py
    for name in ("voc_2012_sem_seg_trainval", "cityscapes_fine_sem_seg_train"):
        with pytest.raises(UserError, match=rf"{name}: expected .* DETECTRON2_DATASETS"):
            get_dataset(name)


def test_train_aug_has_maps_of_its_own(tmp_path, monkeypatch):
    root = write_tiny_semantic(tmp_path / "VOC2012", images=3, split="train_aug")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for name in ("voc_2012_sem_seg_train_aug", f"voc_sem_seg:{root}:train_aug"):
        with pytest.raises(UserError, match=r"SegmentationClassAug.*not part of VOC.*SBD"):
            get_dataset(name)
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    records = get_dataset(f"voc_sem_seg:{root}:train_aug").records()
    assert records[0]["sem_seg_file_name"] == f"{root}/SegmentationClassAug/000.png"
    message = r"train_aug.txt lists 3 images, the published list 10582; .* voc_sem_seg:ROOT:SPLIT"
    with pytest.raises(UserError, match=message):
        get_dataset("voc_2012_sem_seg_train_aug").records()


def test_lists_of_path_pairs_are_read_as_well(tmp_path):
    root = write_tiny_semantic(tmp_path / "voc", images=2)
    pairs = "/JPEGImages/000.jpg /SegmentationClassAug/000.png\n\n/JPEGImages/001.jpg x\n"
    (root / "ImageSets/Segmentation/pairs.txt").write_text(pairs)
    records = get_dataset(f"voc_sem_seg:{root}:pairs").records()
    assert [record["image_id"] for record in records] == ["000", "001"]


@pytest.mark.parametrize("missing", ["JPEGImages/001.jpg", "SegmentationClass/001.png"])
def test_voc_names_the_missing_file(tmp_path, missing):
    root = write_tiny_semantic(tmp_path / "voc", images=2)
    (root / missing).unlink()
    with pytest.raises(UserError, match=rf"train\.txt lists 001, but there is no .*{missing}"):
        get_dataset(f"voc_sem_seg:{root}:train").records()


def test_an_empty_split(tmp_path):
    root = write_tiny_semantic(tmp_path / "voc", images=2)
    (root / "ImageSets/Segmentation/train.txt").write_text("\n")
    with pytest.raises(UserError, match="no image in .*voc, split train"):
        get_dataset(f"voc_sem_seg:{root}:train").records()


def test_cityscapes_prefers_train_ids_and_maps_label_ids(cityscapes):
    dataset = get_dataset(f"cityscapes_sem_seg:{cityscapes}:val")
    first, second = dataset.records()
    assert (first["image_id"], second["image_id"]) == (
        "aachen_000000_000019",
        "bochum_000000_000313",
    )
    assert first["sem_seg_file_name"].endswith("_labelTrainIds.png")
    assert (read_labels(first, 19) == 2).all()
    labels = read_labels(second, 19)
    assert (labels[0] == 255).all()
    assert (labels[1:] == dataset.classes.index("bicycle")).all()
    (cityscapes / f"gtFine/val/{STEMS[0]}_gtFine_labelTrainIds.png").unlink()
    assert (read_labels(dataset.records()[0], 19)[1:] == dataset.classes.index("road")).all()


def test_cityscapes_classes_are_the_official_ones():
    helpers = pytest.importorskip("cityscapesscripts.helpers.labels")
    official = {label.id: label for label in helpers.labels if label.trainId not in (255, -1)}
    assert len(official) == 19
    for train_id, (label_id, name) in enumerate(CITYSCAPES_LABEL_IDS.items()):
        assert official[label_id].trainId == train_id
        assert official[label_id].name == name


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("leftImg8bit/val/{}_leftImg8bit.png", "1 label maps have no image, the first is"),
        ("gtFine/val/{}_gtFine_labelIds.png", "1 images have no label map, the first is"),
    ],
)
def test_cityscapes_names_what_has_no_partner(cityscapes, missing, message):
    path = cityscapes / missing.format(STEMS[1])
    path.unlink()
    # A message of long paths is shortened in its middle.
    with pytest.raises(UserError, match=f"{message} .*{STEMS[1]}.*{path.name}"):
        get_dataset(f"cityscapes_sem_seg:{cityscapes}:val").records()


def test_genuine_voc(shared_data):
    root = shared_data("voc2012_seg10") / "VOC2012"
    records = get_dataset(f"voc_sem_seg:{root}:val").records()
    assert len(records) == 10
    # 2007_000033 shows aeroplanes.
    assert np.unique(read_labels(records[0], 21)).tolist() == [0, 1, 255]
    assert (records[0]["height"], records[0]["width"]) == (366, 500)


def test_genuine_cityscapes(shared_data):
    """The official script's trainIds; and val, of which there are no images."""
    helpers = pytest.importorskip("cityscapesscripts.helpers.labels")
    root = shared_data("cityscapes_sample")
    records = get_dataset(f"cityscapes_sem_seg:{root}:train").records()
    assert len(records) == 4
    for record in records:
        label_ids = np.array(Image.open(record["sem_seg_file_name"]))
        expected = np.full_like(label_ids, 255)
        for label in helpers.labels:
            if label.id >= 0:
                expected[label_ids == label.id] = label.trainId
        assert np.array_equal(read_labels(record, 19), expected)
    with pytest.raises(UserError, match=r"expected .*leftImg8bit/val, which does not exist"):
        get_dataset(f"cityscapes_sem_seg:{root}:val")


def test_detectron2_has_the_same_names_and_classes():
    data = pytest.importorskip("detectron2.data")
    builtin = pytest.importorskip("detectron2.data.datasets.builtin_meta")
    names = {name for name in BUILT_IN if name.startswith("cityscapes_fine_sem_seg")}
    assert names and names <= set(data.DatasetCatalog.list())
    meta = builtin._get_builtin_metadata("cityscapes")
    assert tuple(meta["stuff_classes"]) == tuple(CITYSCAPES_LABEL_IDS.values())


def test_saved_palettes_hide_no_labels(tmp_path):
    """What the other tests rely on: the indices survive, and are not the colours' grey."""
    labels = np.array([[0, 3, 255]], np.uint8)
    save_palette(labels, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        assert image.mode == "P"
        assert np.array(image).tolist() == labels.tolist()
        assert np.array(image.convert("L")).tolist() != labels.tolist()


def test_names_with_dots_keep_their_tails(tmp_path):
    root = write_tiny_semantic(tmp_path / "voc", images=1)
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        path = root / folder / f"000.{ending}"
        path.rename(path.with_name(f"IMG_jpg.rf.fe2a.{ending}"))
    (root / "ImageSets/Segmentation/train.txt").write_text("IMG_jpg.rf.fe2a\n")
    (record,) = get_dataset(f"voc_sem_seg:{root}:train").records()
    assert record["image_id"] == "IMG_jpg.rf.fe2a"


def test_an_unreadable_image_is_named_once(tmp_path):
    root = write_tiny_semantic(tmp_path / "voc", images=1)
    path = root / "JPEGImages/000.jpg"
    path.write_bytes(b"<html>")
    with pytest.raises(UserError) as error:
        get_dataset(f"voc_sem_seg:{root}:train").records()
    assert str(error.value) == f"{path} cannot be decoded: not an image"
