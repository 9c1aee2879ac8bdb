"""The small dense pose data set says what its sources say."""

import json

import numpy as np
from densepose_mini import PART_OF_CHART, write_densepose_mini

from moco_det.datasets import get_dataset
from moco_det.densepose.points import MIRRORED_CHARTS, MIRRORED_PARTS, decode_iuv, read_points


def test_parts_of_mirrored_charts_are_mirrored():
    for chart, mirrored in enumerate(MIRRORED_CHARTS):
        assert PART_OF_CHART[mirrored] == MIRRORED_PARTS[PART_OF_CHART[chart]]
    assert PART_OF_CHART.tolist()[1:5] == [1, 1, 2, 3]  # the torso, the right hand, the left hand


def test_points_and_masks_are_those_of_the_results(shared_data, tmp_path):
    source = shared_data("densepose")
    path = write_densepose_mini(source, tmp_path)
    records = get_dataset(f"densepose:{path}:{tmp_path}").records()
    assert [len(record["annotations"]) for record in records] == [1, 1, 2, 3]
    results = json.loads((source / "example_results.json").read_text())
    for record in records[1:]:
        for annotation in record["annotations"]:
            x0, y0, x1, y1 = annotation["bbox"]
            boxes = [[x0, y0, x1 - x0, y1 - y0]]
            (result,) = (r for r in results if np.allclose(r["bbox"], boxes))
            surface, points = decode_iuv(result), read_points(annotation)
            height, width = surface.shape[1:]
            columns = (points.x.numpy() * width / 256).astype(int)
            rows = (points.y.numpy() * height / 256).astype(int)
            charts, u, v = surface[:, rows, columns]
            assert len(points.x) == 120
            assert points.charts.tolist() == charts.tolist()
            np.testing.assert_allclose(points.u * 255, u, atol=1e-4)
            np.testing.assert_allclose(points.v * 255, v, atol=1e-4)
            # The masks hold the points, but for those that share a pixel of 256 with another part.
            at = points.parts[points.y.long().clamp(max=255), points.x.long().clamp(max=255)]
            assert (at.numpy() == PART_OF_CHART[charts]).mean() > 0.9


def test_the_real_annotation(shared_data, tmp_path):
    path = write_densepose_mini(shared_data("densepose"), tmp_path)
    (annotation,) = get_dataset(f"densepose:{path}:{tmp_path}").records()[0]["annotations"]
    points = read_points(annotation)
    assert annotation["bbox"] == [0, 0, 341, 355]
    assert len(points.x) == 125
    at = points.parts[points.y.long(), points.x.long()]
    assert (at.numpy() == PART_OF_CHART[points.charts]).all()
