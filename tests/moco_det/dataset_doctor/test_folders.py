"""The doctor on PASCAL VOC's layout and Cityscapes': healthy, then broken."""

import numpy as np
import pytest
from examined import doctor, problems
from PIL import Image
from tiny_voc import write_tiny_voc

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset
from moco_det.datasets.dataset import evenly_spaced


@pytest.fixture
def voc(tmp_path):
    return write_tiny_voc(tmp_path / "voc")


def test_healthy_voc(voc):
    reports = doctor(f"voc:{voc}:train", f"voc:{voc}:test", "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    train, test = reports.values()
    assert (train.images, train.objects, train.classes, train.decoded) == (8, 8, 2, 8)
    assert (test.images, test.objects, test.classes, test.decoded) == (4, 4, 2, 4)
    assert train.problems == test.problems == []


def test_all_that_is_wrong_with_a_voc_set_is_found(voc):
    annotations, images = voc / "Annotations", voc / "JPEGImages"
    photographs = {name: images / f"{name}.jpg" for name in ("000", "001", "002", "003")}
    photographs["000"].unlink()
    photographs["001"].write_bytes(photographs["001"].read_bytes()[:400])  # cut off in transfer
    Image.new("RGB", (30, 20)).save(photographs["002"])
    photographs["003"].write_bytes(b"")
    xml = (annotations / "004.xml").read_text()
    empty = "<xmin>5</xmin><ymin>7</ymin><xmax>4</xmax><ymax>7</ymax>"
    box = xml[xml.index("<xmin>") : xml.index("</bndbox>")]
    (annotations / "004.xml").write_text(xml.replace(box, empty))
    (annotations / "005.xml").write_text("<annotation>")
    (annotations / "006.xml").unlink()
    text = (annotations / "007.xml").read_text().replace("</xmax>", "x</xmax>")
    (annotations / "007.xml").write_text(text)
    split = voc / "ImageSets/Main/train.txt"
    split.write_text(split.read_text() + "\n004\nabsent\n")

    (report,) = doctor(f"voc:{voc}:train").values()
    found = problems(report)
    for check, *words in (
        ("image", photographs["000"], "does not exist"),
        ("image", photographs["001"], "cannot be decoded"),
        ("size", photographs["002"], "is 30x20 pixels, its annotation says 64x48"),
        ("image", photographs["003"], "cannot be decoded"),
        ("area", annotations / "004.xml", "a box of zero area, (5, 7, 4, 7)"),
        ("annotation", annotations / "005.xml", "cannot read annotation"),
        ("annotation", annotations / "006.xml", "cannot read annotation"),
        ("annotation", annotations / "007.xml", "lacks the numbers of a <bndbox>"),
        ("list", split, "lists 004 2 times"),
        ("annotation", annotations / "absent.xml", "cannot read annotation"),
        ("image", images / "absent.jpg", "does not exist"),
    ):
        matching = [text for c, text in found if c == check and all(str(w) in text for w in words)]
        assert matching, (check, words)
    assert {check for check, _ in found} == {
        *("image", "size", "area", "annotation", "list", "classes")
    }


def test_the_split_list_is_read_as_in_training(voc):
    """An id may have dots; an id with an extension is not that of an image."""
    for folder, ending in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        path = voc / folder / f"000.{ending}"
        path.rename(path.with_name(f"IMG_jpg.rf.fe2a.{ending}"))
    split = voc / "ImageSets/Main/train.txt"
    split.write_text("IMG_jpg.rf.fe2a 1\n001\n")
    name = f"voc:{voc}:train"
    (report,) = doctor(name, None, "MODEL.ROI_HEADS.NUM_CLASSES", 2).values()
    assert report.problems == []
    assert len(get_dataset(name).records()) == report.images == 2
    split.write_text("001.jpg\n")
    (report,) = doctor(name, None, "MODEL.ROI_HEADS.NUM_CLASSES", 2).values()
    assert any("001.jpg.xml: it does not exist" in text for _, text in problems(report))
    with pytest.raises(UserError, match="no image 001.jpg"):
        get_dataset(name).records()


def test_evenly_spaced_takes_the_ends():
    assert evenly_spaced(range(10), 4) == [0, 3, 6, 9]
    assert evenly_spaced(range(3), 5) == evenly_spaced(range(3), None) == [0, 1, 2]
    assert evenly_spaced(range(3), 1) == [0]
    assert evenly_spaced(range(3), 0) == []


@pytest.fixture
def cityscapes(tmp_path):
    """Two images with maps of labels and instances."""
    for number in (0, 1):
        stem = f"aachen_{number:06d}_000019"
        values = np.zeros((8, 16), np.int32)
        values[:4] = 26001
        for folder, ending, pixels in (
            ("leftImg8bit", "leftImg8bit", np.zeros((8, 16, 3), np.uint8)),
            ("gtFine", "gtFine_instanceIds", values.astype(np.uint16)),
            ("gtFine", "gtFine_labelIds", np.full((8, 16), 26, np.uint8)),
        ):
            path = tmp_path / folder / "train" / "aachen" / f"{stem}_{ending}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path


KINDS = {
    "cityscapes": ("cityscapes_R50_FPN_instance_moco", "instanceIds"),
    "cityscapes_sem_seg": ("cityscapes_R50_FCN16_90k_moco", "labelIds"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_cityscapes(kind, cityscapes):
    config, ending = KINDS[kind]
    name = f"{kind}:{cityscapes}:train"
    report = doctor(name, config=config)[name]
    assert problems(report) == []
    assert (report.images, report.decoded) == (2, 2)
    labels = cityscapes / "gtFine/train/aachen"
    Image.new("RGB", (16, 8)).save(labels / f"aachen_000000_000019_gtFine_{ending}.png")
    (labels / f"aachen_000001_000019_gtFine_{ending}.png").unlink()
    found = problems(doctor(name, config=config)[name])
    assert [check for check, _ in found] == ["labels", "labels"]
    assert f"aachen_000001_000019_gtFine_{ending}.png, which does not exist" in found[0][1]
    assert "Pillow's mode RGB" in found[1][1]
    (cityscapes / "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png").unlink()
    found = problems(doctor(name, config=config)[name])
    assert [check for check, _ in found] == ["labels", "image"]
    assert "aachen_000000_000019_leftImg8bit.png, which does not exist" in found[1][1]


def test_cityscapes_map_of_another_size_and_with_unknown_labels(cityscapes):
    path = cityscapes / "gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png"
    image = cityscapes / "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    name = f"cityscapes:{cityscapes}:train"
    for size, number, text in (
        ((8, 10), 26001, f"{image} is 16x8 pixels, its annotation says 10x8"),
        ((8, 16), 40001, f"{path} holds the number 40001, which is of label 40; Cityscapes' "),
    ):
        Image.fromarray(np.full(size, number, np.uint16)).save(path)
        ((_, found),) = problems(doctor(name, config="cityscapes_R50_FPN_instance_moco")[name])
        assert found.startswith(text)


@pytest.fixture
def semantic_voc(tmp_path):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (16, 8)).save(tmp_path / f"JPEGImages/{name}.jpg")
        Image.fromarray(np.full((8, 16), 20, np.uint8)).save(
            tmp_path / f"SegmentationClass/{name}.png"
        )
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    return tmp_path


def test_semantic_voc(semantic_voc):
    name = f"voc_sem_seg:{semantic_voc}:val"
    report = doctor(name, config="voc_R50_FCN16_30k_moco")[name]
    assert problems(report) == []
    assert (report.images, report.classes, report.decoded) == (2, 21, 2)
    Image.fromarray(np.full((8, 16), 21, np.uint8)).save(semantic_voc / "SegmentationClass/a.png")
    (semantic_voc / "SegmentationClass/b.png").unlink()
    found = problems(doctor(name, config="voc_R50_FCN16_30k_moco")[name])
    assert [check for check, _ in found] == ["labels", "labels"]
    assert "lists b, but there is no " in found[0][1]
    assert "a.png holds the label 21, but there are 21 classes" in found[1][1]


def test_real_label_maps(shared_data):
    root = shared_data("cityscapes_sample")
    for kind, (config, _) in KINDS.items():
        name = f"{kind}:{root}:train"
        assert problems(doctor(name, config=config)[name]) == []
    root = shared_data("voc2012_seg10") / "VOC2012"
    name = f"voc_sem_seg:{root}:val"
    assert problems(doctor(name, config="voc_R50_FCN16_30k_moco")[name]) == []
