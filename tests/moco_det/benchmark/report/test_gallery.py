"""Which detections are right, on boxes that can be checked by hand, and how they are drawn."""

import base64
import re

import cv2
import numpy as np
import pytest

from moco_det.benchmark.report import gallery


def boxes(rows, classes, scores=None):
    return gallery.Boxes(
        np.array(rows, np.float32).reshape(-1, 4),
        np.array(classes, np.int64),
        None if scores is None else np.array(scores, np.float32),
    )


TRUTH = boxes([[0, 0, 10, 10], [20, 20, 40, 40]], [0, 1])


@pytest.mark.parametrize(
    ("rows", "classes", "scores", "right"),
    [
        ([[0, 0, 10, 10]], [0], [0.9], [True]),
        ([[0, 0, 10, 10]], [1], [0.9], [False]),  # the other class
        ([[0, 0, 10, 5]], [0], [0.9], [True]),  # IoU exactly 0.5
        ([[0, 0, 10, 4.9]], [0], [0.9], [False]),
        ([[0, 0, 10, 9], [0, 0, 10, 10]], [0, 0], [0.6, 0.8], [False, True]),  # the surer one
        ([[0, 0, 10, 10], [20, 20, 40, 40]], [0, 1], [0.9, 0.1], [True, True]),
        ([], [], [], []),
    ],
)
def test_matched(rows, classes, scores, right):
    assert gallery.matched(boxes(rows, classes, scores), TRUTH).tolist() == right


def test_without_objects_all_is_wrong():
    nothing = boxes([], [])
    found = boxes([[0, 0, 5, 5]], [0], [0.9])
    assert gallery.matched(found, nothing).tolist() == [False]


def test_words():
    found = boxes([[0, 0, 10, 10], [0, 0, 3, 3]], [0, 0], [0.9, 0.7])
    right = gallery.matched(found, TRUTH)
    assert gallery.in_words(found, right, TRUTH) == "1 of 2 objects found, 1 false detection"


@pytest.mark.parametrize("side", [60, 1200])
def test_picture_embeds_the_image_and_draws_in_its_pixels(tmp_path, side):
    path = tmp_path / "a.png"
    image = np.random.default_rng(0).integers(0, 255, (side, side * 2, 3), np.uint8)
    cv2.imwrite(str(path), cv2.GaussianBlur(image, (0, 0), 5))
    found = boxes([[0, 0, 10, 10], [20, 20, 40, 41], [1, 2, 3, 4]], [0, 0, 0], [0.9, 0.6, 0.2])
    svg = gallery.picture(path, TRUTH, found, ("<a>", "b"), 'an "image"')
    assert f'viewBox="0 0 {side * 2} {side}"' in svg
    data = np.frombuffer(base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1]), np.uint8)
    embedded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert embedded.shape[1] == min(side * 2, gallery.EMBEDDED_SIDE)
    assert svg.count('class="truth"') == 2
    assert svg.count('class="right"') == 1
    assert 'class="wrong" x="20.0" y="20.0" width="20.0" height="21.0"' in svg
    assert "&lt;a&gt; 90%" in svg
    assert "✕ &lt;a&gt; 60%" in svg
    assert "20%" not in svg  # below the score that is shown
    assert "an &quot;image&quot;: 1 of 2 objects found, 1 false detection" in svg


def test_labels_stay_inside_the_image(tmp_path):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.zeros((100, 100, 3), np.uint8))
    found = boxes([[95, 0, 100, 5], [0, 98, 9, 100]], [0, 0], [0.9, 0.9])
    svg = gallery.picture(path, TRUTH, found, ("a_long_class",), "x")
    plates = re.findall(r'class="plate \w+" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', svg)
    assert len(plates) == 2
    for plate in plates:
        x, y, width, height = map(float, plate)
        assert 0 <= x <= x + width <= 100.1
        assert 0 <= y <= y + height <= 100.1
