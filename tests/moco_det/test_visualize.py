"""Drawings: pixels by hand, and predictions that were made of known shapes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from tiny_nyud import write_tiny_nyud
from tiny_voc import write_tiny_voc

from moco_det import colours, visualize
from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset
from moco_det.evaluation.predictions import prediction_record

CLASSES = ("cat", "dog")


def record(*annotations, height=40, width=60):
    return {"height": height, "width": width, "annotations": list(annotations)}


def annotation(box, category=0, **fields):
    return {"bbox": box, "category_id": category, "iscrowd": 0, **fields}


def test_annotated_boxes_and_their_labels():
    found = visualize.annotated_objects(
        record(
            annotation([1, 2, 3, 4]),
            annotation([5, 6, 7, 8], 1, iscrowd=1),
            annotation([5, 6, 7, 9], 1, difficult=1),
        ),
        CLASSES,
    )
    assert found.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 9]]
    assert found.labels == ["cat", "dog (crowd)", "dog (difficult)"]
    assert found.colours[0] != found.colours[1] == found.colours[2]  # one for each class
    assert found.masks is found.keypoints is None


def test_annotated_masks_of_polygons_and_runs():
    square = [10, 10, 20, 10, 20, 20, 10, 20]
    runs = {"size": [40, 60], "counts": [0, 40, 40 * 59]}  # the first column
    shapes = [[square], coco_mask.frPyObjects(runs, 40, 60)]
    annotations = [annotation([0, 0, 5, 5], segmentation=shape) for shape in shapes]
    found = visualize.annotated_objects(record(*annotations, annotation([0, 0, 5, 5])), CLASSES)
    assert found.masks.shape == (3, 40, 60)
    assert found.masks[0].nonzero().min(0)[0].tolist() == [10, 10]
    assert found.masks[0].sum() == 100
    assert found.masks[1, :, 0].all()
    assert found.masks.sum(dim=(1, 2)).tolist() == [100, 40, 0]
    assert len(set(found.colours)) == 3  # one for each object


def test_annotated_keypoints():
    points = [10.5, 11.5, 2, 20.5, 21.5, 1, 0.5, 0.5, 0]
    found = visualize.annotated_objects(
        record(annotation([0, 0, 9, 9], keypoints=points), annotation([0, 0, 9, 9])), CLASSES
    )
    assert found.keypoints.shape == (2, 3, 2)
    assert found.keypoints[0, 1].tolist() == [20.5, 21.5]
    assert found.visible.tolist() == [[True, True, False], [False] * 3]


def test_image_without_objects():
    found = visualize.annotated_objects(record(), CLASSES)
    image = torch.full((3, 40, 60), 7, dtype=torch.uint8)
    assert torch.equal(visualize.draw_objects(image, found), image)


def test_predicted_objects_above_the_threshold_with_the_surest_last():
    masks = torch.zeros(3, 40, 60, dtype=torch.bool)
    masks[0, :4, :5], masks[2, :6, :7] = True, True
    keypoints = torch.zeros(3, 2, 3)
    keypoints[2] = torch.tensor([[8.0, 9.0, 0.9], [3.0, 4.0, 0.01]])
    output = {
        "boxes": torch.arange(12.0).reshape(3, 4),
        "scores": torch.tensor([0.9, 0.2, 0.5]),
        "classes": torch.tensor([1, 1, 0]),
        "masks": masks,
        "keypoints": keypoints,
    }
    found = visualize.predicted_objects(prediction_record(7, output), (40, 60), CLASSES, 0.5)
    assert found.labels == ["cat 50%", "dog 90%"]
    assert found.boxes.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert torch.equal(found.masks, masks[[2, 0]])
    assert found.keypoints[0].tolist() == [[8, 9], [3, 4]]
    assert found.visible.tolist() == [[True, False], [False, False]]


def test_no_prediction_above_the_threshold():
    output = {
        "boxes": torch.zeros(1, 4),
        "scores": torch.tensor([0.1]),
        "classes": torch.tensor([0]),
        "masks": torch.zeros(1, 40, 60, dtype=torch.bool),
        "keypoints": torch.zeros(1, 2, 3),
    }
    found = visualize.predicted_objects(prediction_record(7, output), (40, 60), CLASSES, 0.5)
    assert (len(found.boxes), found.labels) == (0, [])


def test_box_mask_and_keypoint_are_drawn_where_they_are():
    height, width = 120, 160
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[0, 60:80, 50:100] = True
    shade = (200, 100, 50)
    objects = visualize.Objects(
        boxes=torch.tensor([[40.0, 50.0, 110.0, 90.0]]),
        labels=["cat"],
        colours=[shade],
        masks=mask,
        keypoints=torch.tensor([[[60.0, 70.0], [90.0, 70.0], [75.0, 85.0]]]),
        visible=torch.tensor([[True, True, False]]),
    )
    picture = visualize.draw_objects(image, objects, skeleton=[(0, 1), (1, 2)])
    at = {
        "edge": picture[:, 70, 40],
        "keypoint": picture[:, 67, 60],
        "mask": picture[:, 62, 52],
        "line": picture[:, 70, 75],
        "hidden": picture[:, 85, 75],
        "outside": picture[:, 110, 140],
        "plate": picture[:, 48, 42],
    }
    assert at["edge"].tolist() == at["plate"].tolist() == list(shade)
    assert at["keypoint"].tolist() == [255 - channel for channel in shade]
    blend = [round(channel * visualize.MASK_OPACITY) for channel in shade]
    assert np.abs(np.subtract(at["mask"].tolist(), blend)).max() <= 1
    assert at["line"].sum() > sum(shade)  # the skeleton, white
    assert at["hidden"].tolist() == at["outside"].tolist() == [0, 0, 0]
    assert image.sum() == 0  # the photograph itself is left alone


def test_heat_is_warm_where_it_is_large_and_clear_where_it_is_not():
    image = torch.full((3, 40, 80), 100, dtype=torch.uint8)
    heat = torch.tensor([[-5.0, 0.0, 4.0, 8.0]])
    picture = visualize.draw_heat(image, heat, "")
    assert picture.shape == image.shape
    assert (picture[:, 20, :10] == 100).all()  # below zero nothing is drawn
    red, _, blue = picture[:, 20, 79].tolist()
    assert red > 100 > blue  # the warm end of the map
    changed = (picture.int() - 100).abs().sum(0)[20]
    assert changed[30] < changed[50] < changed[75]
    none = visualize.draw_heat(image, torch.full((2, 2), -1.0), "")
    assert torch.equal(none, image)
    assert visualize.draw_heat(image, heat, "", scale=2).shape == (3, 80, 160)
    assert not torch.equal(visualize.draw_heat(image, heat, "cat 90%"), picture)


def test_annotated_dense_pose():
    places = {"dp_x": [0.0, 128.0], "dp_y": [64.0, 256.0]}
    values = {"dp_I": [1.0, 24.0], "dp_U": [0.0, 1.0], "dp_V": [1.0, 0.5]}
    thing = annotation([10, 20, 30, 28], **places, **values)
    found = visualize.annotated_objects(record(thing, annotation([0, 0, 9, 9])), CLASSES)
    expected = torch.tensor([[10.0, 22, 1, 0, 1], [20, 28, 24, 1, 0.5]])
    assert torch.equal(found.points[0], expected)
    assert found.points[1].shape == (0, 5)
    assert visualize.annotated_objects(record(annotation([0, 0, 9, 9])), CLASSES).points is None


def test_predicted_surfaces_follow_the_scores():
    surfaces = [torch.full((3, 4, 5), n, dtype=torch.uint8) for n in (1, 2, 3)]
    output = {
        "boxes": torch.tensor([[0.0, 0, 5, 4]] * 3),
        "scores": torch.tensor([0.9, 0.2, 0.5]),
        "classes": torch.zeros(3).long(),
        "densepose": surfaces,
    }
    found = visualize.predicted_objects(prediction_record(7, output), (40, 60), CLASSES, 0.5)
    assert [int(surface[0, 0, 0]) for surface in found.surfaces] == [3, 1]


def test_colours_of_the_surface():
    """Another hue for each chart; brighter with U, and more saturated with V."""
    charts = torch.arange(1, 25)
    zero, one = torch.zeros(24), torch.ones(24)
    pure = visualize.surface_colours(charts, one, one)
    assert pure.shape == (3, 24)
    assert len({tuple(c) for c in pure.T.tolist()}) == 24
    assert (pure.amax(0) == 255).all()
    assert (pure.amin(0) == 0).all()
    dark = visualize.surface_colours(charts, zero, one)
    assert (dark.amax(0) < 128).all()
    pale = visualize.surface_colours(charts, one, zero)
    assert (pale.amin(0) == round(255 * 0.6)).all()


def test_surface_and_points_are_drawn_where_they_are():
    image = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    surface = torch.zeros(3, 10, 20, dtype=torch.uint8)
    surface[:, :, 10:] = torch.tensor([7, 255, 255])[:, None, None]
    objects = visualize.Objects(
        boxes=torch.tensor([[45.7, 35.2, 60.0, 40.0]]),  # the surface reaches over the image
        labels=[""],
        colours=[(1, 2, 3)],
        points=[torch.tensor([[10.0, 12.0, 9.0, 0.5, 0.5]])],
        surfaces=[surface],
    )
    picture = visualize.draw_objects(image, objects)
    shade = visualize.surface_colours(*torch.tensor([[7.0], [1.0], [1.0]]))
    opacity = visualize.SURFACE_OPACITY
    blend = (opacity * shade + (1 - opacity) * 100).round()[:, 0]
    assert torch.equal(picture[:, 37, 57].float(), blend)
    assert picture[:, 37, 50].tolist() == [100] * 3  # background inside the box
    dot = visualize.surface_colours(*torch.tensor([[9.0], [0.5], [0.5]]))
    assert torch.equal(picture[:, 12, 10], dot[:, 0])
    assert picture[:, 12, 20].tolist() == [100] * 3
    assert (image == 100).all()


def test_enlarged_objects_lie_where_the_enlarged_image_has_them():
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 1, 2] = True
    objects = visualize.Objects(
        boxes=torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        labels=["cat"],
        colours=[(1, 2, 3)],
        masks=mask,
        keypoints=torch.tensor([[[1.5, 2.5]]]),
        visible=torch.tensor([[True]]),
        points=[torch.tensor([[1.0, 2.0, 9.0, 0.5, 0.25]])],
        surfaces=[torch.arange(6, dtype=torch.uint8).reshape(3, 1, 2)],
    )
    large = objects.enlarged(3)
    assert large.boxes.tolist() == [[3, 6, 9, 12]]
    assert large.masks.shape == (1, 12, 18)
    assert large.masks[0, 3:6, 6:9].all() and large.masks.sum() == 9
    assert large.keypoints.tolist() == [[[4.5, 7.5]]]
    assert large.points[0].tolist() == [[3, 6, 9, 0.5, 0.25]]  # chart, U and V are no places
    assert large.surfaces[0][2].tolist() == [[4, 4, 4, 5, 5, 5]] * 3


def test_label_map_leaves_void_and_background():
    classes = ("background", "cat", "dog")
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    labels = np.full((100, 100), 255, np.uint8)
    labels[:, 40:70], labels[:, 70:] = 0, 2
    picture = visualize.draw_labels(image, labels, classes)
    assert picture[:, :, :65].sum() == 0
    blend = [round(channel * visualize.LABEL_MAP_OPACITY) for channel in colours.colour(2)]
    assert np.abs(np.subtract(picture[:, 99, 99].tolist(), blend)).max() <= 1
    empty = np.full((100, 100), 255, np.uint8)
    assert torch.equal(visualize.draw_labels(image, empty, classes), image)


def test_label_map_of_a_prediction():
    scores = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    prediction = prediction_record("a", {"sem_seg": scores})
    found = visualize.predicted_labels(prediction, (20, 30))
    assert np.array_equal(found, scores.argmax(0).numpy())
    del prediction["sem_seg"][1]
    found = visualize.predicted_labels(prediction, (20, 30))
    assert set(np.unique(found)) == {0, 2, 255}


def test_depths_are_colours_of_one_scale(tmp_path, capsys):
    """Near is red, far is blue; what is unknown stays as it is, and 10 m is the end."""
    image = torch.full((3, 4, 6), 77, dtype=torch.uint8)
    depths = np.zeros((4, 6), np.float32)
    depths[:, 1], depths[:, 2], depths[:, 3:] = 0.5, 9.5, 30
    picture = visualize.draw_depth(image, depths)
    assert (picture[:, :, 0] == 77).all()
    near, far, beyond = (picture[:, 0, x].tolist() for x in (1, 2, 3))
    assert near[0] > 2 * near[2]
    assert far[2] > 2 * far[1]
    assert beyond == visualize.draw_depth(image, depths / 3)[:, 0, 3].tolist()  # 10 m
    dataset = get_dataset(f"nyud_depth:{write_tiny_nyud(tmp_path / 'nyud')}:train")
    record = dataset.records()[0]
    drawn = visualize.draw_annotations(image := visualize.read_image(record), record, dataset)
    found = prediction_record("0001", {"depth": torch.from_numpy(dataset.read_map(record))})
    again = visualize.draw_prediction(image, found, dataset, 0.5)
    assert (drawn != again).float().mean() < 0.01  # millimetres
    assert torch.equal(visualize.draw_prediction(image, {}, dataset, 0.5), image)
    found["depth"]["size"] = [1, 1]
    assert torch.equal(visualize.draw_prediction(image, found, dataset, 0.5), image)
    assert "depths of (height, width) [1, 1]" in capsys.readouterr().err


def test_skeleton_of_the_annotation_file(tmp_path):
    category = {
        "id": 1,
        "name": "person",
        "keypoints": ["a", "b", "c"],
        "skeleton": [[1, 2], [3, 1]],
    }
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": [category]}))
    dataset = get_dataset(f"coco:{path}:{tmp_path}")
    assert visualize.skeleton_of(dataset) == [(0, 1), (2, 0)]
    path.write_text(
        json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]})
    )
    assert visualize.skeleton_of(get_dataset(f"coco:{path}:{tmp_path}")) == []


def test_image_is_upright(tmp_path):
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = visualize.read_image({"file_name": str(tmp_path / "a.png")})
    assert image.shape == (3, 20, 10)
    assert image[:, :10].min() == 255
    assert image[:, 10:].max() == 0


def test_unreadable_image(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read image .*a.jpg"):
        visualize.read_image({"file_name": str(tmp_path / "a.jpg")})


def test_contact_sheet():
    wide = torch.zeros(3, 100, 200, dtype=torch.uint8)
    tall = torch.full((3, 100, 50), 9, dtype=torch.uint8)
    sheet = visualize.contact_sheet([wide, tall, wide, tall], cell=100)
    # Cells of 100 x 100, in two columns, with 4 pixels around each.
    assert sheet.shape == (3, 212, 212)
    assert sheet[0, 10, 10] == 0
    assert sheet[0, 10, 115] == 9
    assert sheet[0, 10, 180] == 255  # beside the tall one
    assert visualize.contact_sheet([tall]).shape[1:] == (100, 50)


def test_neighbouring_colours_differ():
    shades = [np.array(colours.colour(index)) for index in range(20)]
    for one, other in zip(shades, shades[1:], strict=False):
        assert np.abs(one - other).sum() > 150


def test_annotations_and_predictions_side_by_side(tmp_path, monkeypatch):
    """Of 7 images the first, the third, the fifth and the last, which was not predicted."""
    dataset = get_dataset(f"voc:{write_tiny_voc(tmp_path / 'VOC', images=21)}:test")
    records = dataset.records()
    scores = [0.9, 0.9, 0.2, 0.9, 0.9, 0.9]
    predictions = [
        {"image_id": r["image_id"], "boxes": torch.tensor([[2.0, 2.0, 20.0, 20.0]]),
         "scores": torch.tensor([score]), "classes": torch.tensor([0])}
        for r, score in zip(records, scores, strict=False)
    ]  # fmt: skip
    shown = dict(visualize.compared(dataset, predictions))
    folder = visualize.re.sub("[^A-Za-z0-9-]+", "_", dataset.name)
    assert list(shown) == [f"{folder}/{number}" for number in (0, 1, 2)]
    for picture, index in zip(shown.values(), (0, 2, 4), strict=True):
        record = records[index]
        image = visualize.read_image(record)
        left, right = picture.split(image.shape[2], dim=2)
        assert torch.equal(left, visualize.draw_annotations(image, record, dataset))
        assert torch.equal(
            right, visualize.draw_prediction(image, predictions[index], dataset, 0.5)
        )
        assert torch.equal(right, image) == (scores[index] < 0.5)
    monkeypatch.setattr(visualize, "LONGEST_COMPARED", 20)
    _, small = next(visualize.compared(dataset, predictions))
    assert max(small.shape[1], small.shape[2] // 2) == 20
