"""What cannot be scored after the last iteration is said before the first."""

import pytest
from pycocotools import mask as coco_mask
from tiny_coco import tiny_coco, write_tiny_coco
from tiny_semantic import write_tiny_semantic
from tiny_voc import write_tiny_voc

from moco_det.common.errors import UserError
from moco_det.config.checks import check_scoring
from moco_det.config.loading import get_cfg
from moco_det.datasets import get_dataset
from moco_det.datasets.dataset import evenly_spaced
from moco_det.evaluation import REHEARSED, evaluate, rehearse


def own_objects(record):
    """The objects of a record as they would be predicted without a mistake."""
    objects = record["annotations"]
    return {
        "image_id": record["image_id"],
        "boxes": [a["bbox"] for a in objects],
        "scores": [0.9] * len(objects),
        "classes": [a["category_id"] for a in objects],
    }


NUMBERINGS = {
    "from 0": lambda place, image: place,
    "anew in each image": lambda place, image: place % 2 + 1,
    "all the same": lambda place, image: 7,
    "texts": lambda place, image: f"a{place}",
    "none": lambda place, image: None,
    "negative": lambda place, image: -place,
    "huge": lambda place, image: 2**70 + place,
    "lists": lambda place, image: [place],
}


@pytest.mark.parametrize("numbering", NUMBERINGS)
def test_perfect_predictions_have_ap_100_however_annotations_are_numbered(tmp_path, numbering):
    content = tiny_coco()
    for place, annotation in enumerate(content["annotations"]):
        annotation["id"] = NUMBERINGS[numbering](place, annotation["image_id"])
        if annotation["id"] is None:
            del annotation["id"]
    dataset = get_dataset(write_tiny_coco(tmp_path, content))
    results = evaluate(dataset, [own_objects(record) for record in dataset.records()])
    assert results["bbox"]["AP"] == pytest.approx(100)


def rehearsed(name, **options):
    dataset = get_dataset(name)
    rehearse(dataset, dataset.records(), **options)


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("annotations", {"area": None}),
        ("images", {"height": 96.0, "width": 128.0}),
        ("images", {"height": None, "width": None}),
        ("annotations", {"iscrowd": None, "id": None, "area": None}),
    ],
)
def test_what_is_accepted_before_is_scored_after(tmp_path, section, fields):
    """Boxes and masks without a mistake: each of these trained to the end and died in scoring."""
    content = tiny_coco()
    for entry in content[section]:
        entry |= fields
    dataset = get_dataset(write_tiny_coco(tmp_path, content))
    records = dataset.records()
    rehearse(dataset, records, masks=True)
    shapes = [
        coco_mask.frPyObjects(a["segmentation"], 96, 128) for r in records for a in r["annotations"]
    ]
    predictions = [own_objects(record) for record in records]
    for place, prediction in enumerate(predictions):
        prediction["segmentations"] = [shape for (shape,) in shapes[2 * place : 2 * place + 2]]
    results = evaluate(dataset, predictions)
    assert [results[task]["AP"] for task in ("bbox", "segm")] == pytest.approx([100, 100])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"area": "120"}, "annotation 5 of image 3 has the area '120'"),
        ({"segmentation": [[1, 2, 3, 4]]}, "annotation 5 of image 3 has no valid polygon"),
        ({"iscrowd": 1, "segmentation": []}, "annotation 5 of image 3 has no segmentation"),
    ],
)
def test_an_object_beyond_the_images_that_are_tried(tmp_path, fields, message):
    """It is one of 40 images; `rehearse` scores 8 of them, which do not hold it."""
    content = tiny_coco()
    image, objects = content["images"][0], content["annotations"][:2]
    content["images"] = [image | {"id": number} for number in range(1, 41)]
    content["annotations"] = [
        a | {"image_id": number, "id": 2 * number - 1 + place}
        for number in range(1, 41)
        for place, a in enumerate(objects)
    ]
    content["annotations"][4] |= fields
    name = write_tiny_coco(tmp_path, content)
    assert 2 not in evenly_spaced(range(40), REHEARSED)
    with pytest.raises(UserError, match=f"a.json: {message}"):
        rehearsed(name, masks=True)


def test_healthy_sets(tmp_path):
    name = write_tiny_coco(tmp_path / "coco", tiny_coco())
    rehearsed(name, masks=True, keypoints=3, keypoint_sigmas=[0.1] * 3)
    rehearsed(f"voc:{write_tiny_voc(tmp_path / 'voc')}:test")
    rehearsed(f"voc_sem_seg:{write_tiny_semantic(tmp_path / 'labels', images=3)}:train")


def test_an_image_without_objects_alone_can_be_scored(tmp_path):
    rehearsed(write_tiny_coco(tmp_path, tiny_coco() | {"annotations": []}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segmentation": []}, "annotation 1 of image 1 has no segmentation"),
        ({"segmentation": [[]]}, "annotation 1 of image 1 has no valid polygon"),
        ({"segmentation": [[1, 2, 3, 4]]}, "annotation 1 of image 1 has no valid polygon"),
        ({"segmentation": [], "iscrowd": 1}, "annotation 1 of image 1 has no segmentation"),
    ],
)
def test_masks_that_cannot_be_scored_are_named(tmp_path, fields, message):
    content = tiny_coco()
    content["annotations"][0] |= fields
    name = write_tiny_coco(tmp_path, content)
    rehearsed(name)
    with pytest.raises(UserError, match=f"a.json: {message}"):
        rehearsed(name, masks=True)


def test_sigmas_of_another_number_of_keypoints(tmp_path):
    name = write_tiny_coco(tmp_path, tiny_coco())
    with pytest.raises(UserError, match="3 keypoints .* 17 sigmas: set TEST.KEYPOINT_OKS_SIGMAS"):
        rehearsed(name, keypoints=3)


def test_a_label_map_beyond_the_few_that_are_scored(tmp_path):
    root = write_tiny_semantic(tmp_path, images=20)
    (root / "SegmentationClass" / "001.png").write_bytes(b"")
    with pytest.raises(UserError, match="cannot read the label map .*001.png"):
        rehearsed(f"voc_sem_seg:{root}:train")


def test_what_a_tool_raises_is_one_line(tmp_path, monkeypatch):
    def stumble(*arguments):
        raise IndexError("of a tool")

    monkeypatch.setattr("moco_det.evaluation.evaluate", stumble)
    name = write_tiny_coco(tmp_path, tiny_coco())
    with pytest.raises(UserError, match=f"dataset {name} cannot be scored: IndexError: of a tool"):
        rehearsed(name)


def test_all_test_sets_of_a_config_are_tried_and_their_images_looked_for(tmp_path):
    name = write_tiny_coco(tmp_path, tiny_coco())
    cfg = get_cfg()
    check_scoring(cfg, [name])
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(UserError, match="TEST.KEYPOINT_OKS_SIGMAS|NUM_KEYPOINTS"):
        check_scoring(cfg, [name])
    (tmp_path / "2.jpg").unlink()
    with pytest.raises(UserError, match="2.jpg does not exist"):
        check_scoring(cfg, [name])
