"""Geodesic point similarity and overlaps by hand; `evaluation/test_densepose.py` has real cases."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from moco_det.densepose import body
from moco_det.densepose.body import Geodesics, Points, pairwise_similarity, point_similarity
from moco_det.densepose.points import encode_iuv

KAPPA = 0.351  # of the torso


@pytest.fixture
def geodesics():
    """A torso of two vertices, U = 0 and U = 1, that are 0.2 m apart."""
    charts, uv = np.array([1, 1]), np.array([[0.0, 1.0], [0.0, 0.0]])
    return Geodesics(charts, uv, np.array([0, 1]), lambda larger, smaller: 0.2 * (larger - smaller))


def surface(u, height=4, width=4):
    """The torso all over, with one U."""
    iuv = np.zeros((3, height, width), np.uint8)
    iuv[0], iuv[1] = 1, u
    return iuv


def points(*places):
    """On the vertex at U = 0, at these (x, y) of the image."""
    x, y = np.array(places, dtype=float).T
    return Points(x, y, np.zeros(len(x), int), np.full(len(x), KAPPA))


def test_by_hand(geodesics):
    near = math.exp(-(0.2**2) / (2 * KAPPA**2))
    inside = points((11, 21), (12, 22))
    assert point_similarity(surface(0), (10, 20), inside, geodesics) == 1
    assert point_similarity(surface(255), (10, 20), inside, geodesics) == pytest.approx(near)
    half = surface(0)
    half[1, :, 2:] = 255  # the right half is the other vertex
    assert point_similarity(half, (10, 20), inside, geodesics) == pytest.approx((1 + near) / 2)


def test_what_is_outside_or_background_counts_as_0(geodesics):
    places = points((11, 21), (14, 21), (11, 24), (8.9, 21))
    assert point_similarity(surface(0), (10, 20), places, geodesics) == 0.25
    # Rounded towards zero: less than a pixel left of the detection is its first column.
    assert point_similarity(surface(0), (10, 20), points((9.1, 21)), geodesics) == 1
    assert point_similarity(surface(0), (50, 50), places, geodesics) == 0
    background = surface(0)
    background[0] = 0
    assert point_similarity(background, (10, 20), places, geodesics) == 0


def test_pairs_of_an_image(geodesics):
    """Two detections, an annotated person, one without points, and a crowd."""
    left = {"bbox": [0, 0, 4, 4], "densepose": encode_iuv(surface(0)), "image_id": 1}
    right = {"bbox": [4, 0, 4, 4], "densepose": encode_iuv(surface(0)), "image_id": 1}
    square = {"segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]], "bbox": [0, 0, 4, 4], "iscrowd": 0}
    posed = {**square, "dp_x": [100.0], "dp_y": [100.0], "dp_I": [1.0], "dp_U": [0], "dp_V": [0]}
    wide = {"segmentation": [[0, 0, 8, 0, 8, 4, 0, 4]], "bbox": [0, 0, 8, 4], "iscrowd": 1}
    found = pairwise_similarity([posed, square, wide], [left, right], (10, 10), geodesics)
    assert found.gps.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert found.masks.tolist() == [[1, 1, 1], [0, 0, 1]]  # of a crowd, the detection's share
    assert found.boxes.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_no_detection_or_no_object(geodesics):
    assert pairwise_similarity([], [], (10, 10), geodesics).gps.shape == (0, 0)
    left = {"bbox": [0, 0, 4, 4], "densepose": encode_iuv(surface(0)), "image_id": 1}
    found = pairwise_similarity([], [left], (10, 10), geodesics)
    assert [part.shape for part in found] == [(1, 0)] * 3


def test_annotated_points_lie_on_the_image_where_the_official_code_puts_them():
    """255 of the annotation's 256 steps are the box's width; points of background are left out."""
    annotation = {
        "bbox": [10.0, 20.0, 51.0, 102.0],
        "dp_x": [0.0, 255.0, 51.0, 9.0],
        "dp_y": [0.0, 255.0, 102.0, 9.0],
        "dp_I": [1.0, 24.0, 7.0, 0.0],
        "dp_U": [0.1, 0.2, 0.3, 0.4],
        "dp_V": [0.5, 0.6, 0.7, 0.8],
    }
    asked = []
    nearest = SimpleNamespace(nearest=lambda *fields: asked.append(fields) or fields[0])
    found = body._points(annotation, nearest)
    assert found.x.tolist() == pytest.approx([10.0, 61.0, 20.2])
    assert found.y.tolist() == pytest.approx([20.0, 122.0, 60.8])
    assert found.body.tolist() == [1, 24, 7]
    ((charts, u, v),) = asked
    assert (charts.tolist(), u.tolist(), v.tolist()) == (
        [1, 24, 7],
        [0.1, 0.2, 0.3],
        [0.5, 0.6, 0.7],
    )
    assert found.kappa.tolist() == [0.351, 0.150, 0.237]
