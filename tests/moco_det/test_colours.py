"""Colours against the data sets' own tools; labels by hand-placed boxes."""

import colorsys

import numpy as np
import pytest
import torch

from moco_det import visualize
from moco_det.colours import (
    HIDDEN,
    LEAST_DIFFERENCE,
    Labels,
    colour,
    distinct,
    family,
    ink,
    palette,
)


def test_cityscapes_has_its_official_colours():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    official = [label.color for label in labels if not label.ignoreInEval]
    classes = [label.name for label in labels if not label.ignoreInEval]
    assert len(classes) == 19
    assert palette(classes) == official
    instances = [label for label in labels if label.hasInstances and not label.ignoreInEval]
    assert palette([label.name for label in instances]) == [label.color for label in instances]


def test_label_maps_of_voc_have_its_colours():
    # The first and the last of the development kit's colour map.
    found = palette(["background", *map(str, range(20))])
    assert found[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert found[-2:] == [(128, 192, 0), (0, 64, 128)]


def test_one_class_that_cityscapes_has_too_is_no_cityscapes():
    assert palette(["person"]) == [colour(0)]
    assert palette(["cat", "dog"]) == [colour(0), colour(1)]


def test_objects_that_touch_differ_clearly():
    rng = np.random.default_rng(0)
    corners = torch.from_numpy(rng.uniform(0, 300, (25, 2)))
    boxes = torch.cat([corners, corners + 40], dim=1)
    found = distinct(boxes, [colour(0)] * 25)
    compared = 0
    for i, one in enumerate(found):
        for j, other in enumerate(found[:i]):
            if (boxes[i, :2] <= boxes[j, 2:]).all() and (boxes[j, :2] <= boxes[i, 2:]).all():
                compared += 1
                assert np.abs(np.subtract(one, other)).sum() >= LEAST_DIFFERENCE
    assert compared > 10


def test_many_objects_in_one_place_are_told_apart_as_far_as_colours_go():
    found = distinct(torch.tensor([[0.0, 0, 9, 9]] * 9), [colour(3)] * 9)
    assert len(set(found)) == 9


def test_truth_and_prediction_of_a_class_have_one_family_of_colours():
    """Whatever else the two pictures show, and in which order."""
    shades, far = [colour(0), colour(1), colour(2)], torch.tensor([[0.0, 0, 9, 9]])
    boxes = torch.cat([far + 20 * i for i in range(3)])
    truth = distinct(boxes, shades)
    prediction = distinct(boxes[[2, 0]], [shades[2], shades[0]])
    assert (truth, prediction) == (shades, [shades[2], shades[0]])
    for shade in shades:
        hues = [colorsys.rgb_to_hsv(*kin)[0] for kin in family(shade)]
        turns = [abs((hue - colorsys.rgb_to_hsv(*shade)[0] + 0.5) % 1 - 0.5) for hue in hues]
        assert max(turns) < 0.06


@pytest.mark.parametrize(
    ("shade", "expected"), [((255, 255, 0), 0), ((80, 0, 255), 255), ((0, 0, 142), 255)]
)
def test_ink_is_read_on_its_plate(shade, expected):
    assert ink(shade) == (expected,) * 3


def labels_of(*boxes, picture=(200, 200)) -> Labels:
    return Labels(np.array(boxes, float), picture)


def test_a_label_is_above_its_box():
    box = [50, 60, 90, 100]
    assert labels_of(box).place((30, 10), box) == (50, 50, 80, 60)


def test_a_label_is_below_where_something_small_is_above():
    box = [50, 60, 90, 100]
    assert labels_of(box, [55, 48, 65, 58]).place((30, 10), box) == (50, 100, 80, 110)


def test_a_label_lies_on_a_large_object_rather_than_on_another_label():
    box = [50, 60, 90, 100]
    labels = labels_of([0, 0, 200, 200], box)
    assert labels.place((30, 10), box) == (50, 50, 80, 60)
    assert labels.place((30, 10), box) == (50, 100, 80, 110)


def test_labels_together_hide_no_more_than_one_may():
    """Each of these takes a fifth of the large box, where a quarter may be hidden."""
    labels = labels_of([0, 0, 100, 10], [0, 12, 1, 13], picture=(100, 13))
    assert labels.place((20, 10), [0, 0, 20, 10]) is not None
    assert labels.hidden[0] == pytest.approx(0.2)
    assert labels.place((20, 10), [50, 0, 70, 10]) is None


def test_a_label_that_would_hide_an_object_wherever_it_stands_is_left_out():
    x, y = np.meshgrid(np.arange(0, 60, 6.0), np.arange(0, 60, 6.0))
    boxes = np.stack([x, y, x + 5, y + 5], axis=-1).reshape(-1, 4)
    assert Labels(boxes, (60, 60)).place((30, 10), boxes[44]) is None


def test_no_small_object_is_hidden_by_a_label():
    """As one in three was when each label stood above its box."""
    rng = np.random.default_rng(1)
    corners = torch.from_numpy(rng.uniform(10, 180, (30, 2))).round().float()
    boxes = torch.cat([corners, corners + 12], dim=1)
    image = torch.zeros(3, 200, 200, dtype=torch.uint8)
    objects = visualize.Objects(boxes, ["aeroplane"] * 30, [(9, 9, 9)] * 30)
    unlabelled = visualize.Objects(boxes, [""] * 30, [(9, 9, 9)] * 30)
    plain = visualize.draw_objects(image, unlabelled)
    labelled = visualize.draw_objects(image, objects)
    assert (labelled == 255).any()  # the letters are white
    for x0, y0, x1, y1 in boxes.int().tolist():
        changed = (labelled != plain)[:, y0:y1, x0:x1].any(0).float().mean()
        assert changed <= HIDDEN
