"""Inputs and results of Detectron2's detector beside ours, with it and with a stand-in for it."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moco_det.densepose.points import DensePosePoints

BOXES = torch.tensor([[1.0, 2.0, 9.0, 8.0], [0.0, 0.0, 4.0, 5.0]])


@pytest.fixture
def item():
    return {
        "image": torch.zeros(3, 12, 16, dtype=torch.uint8),
        "gt_boxes": BOXES,
        "gt_classes": torch.tensor([3, 1]),
        "height": 24,
        "width": 32,
    }


def test_objects_become_instances(plugin, item):
    found = plugin.probe.detectron2_input(item)
    assert found.keys() == {"image", "height", "width", "instances"}
    assert (found["height"], found["width"]) == (24, 32)
    objects = found["instances"]
    assert tuple(objects.image_size) == (12, 16)
    assert torch.equal(objects.gt_boxes.tensor, BOXES)
    assert torch.equal(objects.gt_classes, item["gt_classes"])
    for name in ("gt_masks", "gt_keypoints", "gt_densepose"):
        assert not objects.has(name)


def test_masks_and_keypoints_are_detectron2_s(plugin, item):
    polygons = [[np.array([1.0, 2, 9, 2, 9, 8])], [np.array([0.0, 0, 4, 0, 4, 5])]]
    keypoints = torch.rand(2, 3, 3)
    found = plugin.probe.detectron2_input(item | {"gt_masks": polygons, "gt_keypoints": keypoints})
    objects = found["instances"]
    assert type(objects.gt_masks) is plugin.d2.structures.PolygonMasks
    assert np.array_equal(objects.gt_masks.polygons[1][0], polygons[1][0])
    assert torch.equal(objects.gt_keypoints.tensor, keypoints)
    bits = torch.rand(2, 12, 16) > 0.5
    objects = plugin.probe.detectron2_input(item | {"gt_masks": bits})["instances"]
    assert type(objects.gt_masks) is plugin.d2.structures.BitMasks
    assert torch.equal(objects.gt_masks.tensor, bits)


def test_label_maps_are_passed_on(plugin):
    item = {"image": torch.zeros(3, 4, 4), "sem_seg": torch.zeros(4, 4)}
    assert plugin.probe.detectron2_input(item) is item


def test_dense_pose_is_the_project_s(plugin, item, monkeypatch):
    made = []
    structures = SimpleNamespace(
        DensePoseDataRelative=lambda annotation: annotation,
        DensePoseList=lambda *arguments: made.append(arguments) or ["a", "b"],
    )
    monkeypatch.setitem(sys.modules, "densepose", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "densepose.structures", structures)
    x, y, u, v = torch.arange(4.0)[:, None] + 0.25
    parts = torch.full((256, 256), 3, dtype=torch.uint8)
    points = DensePosePoints(x, y, torch.tensor([7]), u, v, parts)
    bare = DensePosePoints(x, y, torch.tensor([7]), u, v, None)
    found = plugin.probe.detectron2_input(item | {"gt_densepose": [points, None]})["instances"]
    assert found.gt_densepose == ["a", "b"]
    plugin.probe.ground_truth([bare, points], found)
    (((one, none), boxes, size), ((without, _), _, _)) = made
    assert none is None
    assert torch.equal(boxes.tensor, BOXES)
    assert tuple(size) == (12, 16)
    expected = {"dp_x": 0.25, "dp_y": 1.25, "dp_I": 7.0, "dp_U": 2.25, "dp_V": 3.25}
    assert {name: one[name].item() for name in expected} == expected
    assert one["dp_I"].dtype == one["dp_masks"].dtype == torch.float32
    assert torch.equal(one["dp_masks"], parts.float())
    assert "dp_masks" not in without
    nobody = plugin.probe.detectron2_input(item | {"gt_densepose": [None, None]})["instances"]
    assert not nobody.has("gt_densepose")


def test_what_the_heads_found(plugin):
    Instances = plugin.d2.structures.Instances
    assert plugin.probe.fields_in_boxes(Instances((12, 16))) == {}
    masks, heatmaps = torch.rand(2, 1, 28, 28), torch.rand(2, 5, 56, 56)
    charts = SimpleNamespace(
        **{name: torch.rand(2, 3, 4, 4) for name in ("coarse_segm", "fine_segm", "u", "v")},
        __len__=lambda: 2,
    )
    found = Instances((12, 16), pred_masks=masks, pred_keypoint_heatmaps=heatmaps)
    vars(found).get("_fields", vars(found))["pred_densepose"] = charts
    fields = plugin.probe.fields_in_boxes(found)
    assert torch.equal(fields["mask_probabilities"], masks[:, 0])
    assert fields["keypoint_heatmaps"] is heatmaps
    assert fields["charts"].coarse is charts.coarse_segm
    assert fields["charts"].fine is charts.fine_segm
    assert (fields["charts"].u, fields["charts"].v) == (charts.u, charts.v)


def test_proposals_and_detections_of_the_stages(plugin):
    structures, probe = plugin.d2.structures, object.__new__(plugin.probe.Probe)
    logits = torch.tensor([0.5, -1.0])
    proposals = structures.Instances(
        (12, 16), proposal_boxes=structures.Boxes(BOXES), objectness_logits=logits
    )
    boxes, scores = probe.proposals([], {"proposal_generator": ([proposals], {})})
    assert torch.equal(boxes[0], BOXES)
    assert torch.equal(scores[0], logits)
    detected = structures.Instances(
        (24, 32),
        pred_boxes=structures.Boxes(2 * BOXES),
        scores=torch.tensor([0.9, 0.1]),
        pred_classes=torch.tensor([1, 0]),
    )
    masks = torch.rand(2, 1, 28, 28)
    in_boxes = structures.Instances((12, 16), pred_masks=masks)
    (found,), (fields,) = probe.detections(
        [{"instances": detected}], {"roi_heads": ([in_boxes], {})}
    )
    assert torch.equal(found["boxes"], 2 * BOXES)
    assert torch.equal(fields["mask_probabilities"], masks[:, 0])


def test_scores_are_put_back_to_float32_for_nms(plugin):
    levels = [torch.rand(2, dtype=torch.float64), torch.rand(3, dtype=torch.float64)]
    logits, deltas = plugin.probe.in_float32(None, None, (levels, levels[:1]))
    assert [x.dtype for x in (*logits, *deltas)] == [torch.float32] * 3
    assert torch.equal(logits[1], levels[1].float())
