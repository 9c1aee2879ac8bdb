"""The comparison of two engines' quantities, without any engine but the native one."""

import math

import pytest
import torch
from paths import CONFIGS
from torch import nn

from moco_det.config.loading import get_cfg, load_config
from moco_det.native.modeling.meta_arch import build_model
from moco_det.parity.comparison import (
    SPREADS,
    Difference,
    build_items,
    compare,
    draw_dense_pose,
    draw_items,
    draw_keypoints,
    draw_outlines,
    fill_outlines,
    randomize_for_parity,
    table,
)

ALL_HEADS = """MODEL.MASK_ON True MODEL.ROI_MASK_HEAD.CONV_DIM 8 MODEL.KEYPOINT_ON True
MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (8,) MODEL.DENSEPOSE_ON True
MODEL.ROI_HEADS.NAME DensePoseROIHeads MODEL.ROI_DENSEPOSE_HEAD.NAME DensePoseV1ConvXHead
MODEL.ROI_DENSEPOSE_HEAD.DECODER_ON False MODEL.ROI_DENSEPOSE_HEAD.NUM_STACKED_CONVS 1
MODEL.ROI_DENSEPOSE_HEAD.CONV_HEAD_DIM 8 MODEL.ROI_DENSEPOSE_HEAD.POOLER_RESOLUTION 14
MODEL.ROI_DENSEPOSE_HEAD.HEATMAP_SIZE 56"""
ONE = {"loss": [torch.tensor(2.0)], "maps": [torch.tensor([1.0, -4.0]), torch.tensor([0.1, 0.2])]}


def by_name(differences):
    return {x.quantity: x for x in differences}


def test_differences_are_the_largest_over_a_quantitys_tensors():
    other = {
        "loss": [torch.tensor(2.5)],
        # 0.5 of 4 and 0.04 of 0.2: the second is larger by its own scale.
        "maps": [torch.tensor([1.5, -4.0]), torch.tensor([0.06, 0.2])],
    }
    found = by_name(compare(ONE, other))
    assert (found["loss"].absolute, found["loss"].relative, found["loss"].values) == (0.5, 0.25, 1)
    assert (found["maps"].absolute, found["maps"].values) == (0.5, 4)
    assert found["maps"].relative == pytest.approx(0.2)
    assert found["maps"].within(0.21)
    assert not found["maps"].within(0.19)


def test_equal_quantities_differ_by_zero_and_empty_ones_too():
    empty = {"boxes": [torch.zeros(0, 4)], "zeros": [torch.zeros(3)], "none": []}
    for quantities in (ONE, empty):
        for difference in compare(quantities, quantities):
            assert (difference.absolute, difference.relative) == (0.0, 0.0)
            assert difference.within(0.0)


@pytest.mark.parametrize(
    ("reference", "other", "problem"),
    [
        ([torch.zeros(12, 4)], [torch.zeros(11, 4)], "shape: (11, 4), not (12, 4)"),
        ([torch.zeros(4)], [torch.zeros(4), torch.zeros(4)], "shape: another number of tensors"),
        ([torch.zeros(4)], None, "missing in the other"),
        (None, [torch.zeros(4)], "missing in the reference"),
    ],
)
def test_what_cannot_be_subtracted_fails_and_says_why(reference, other, problem):
    sides = [{} if side is None else {"boxes": side} for side in (reference, other)]
    (difference,) = compare(*sides)
    assert difference.problem == problem
    assert not difference.within(math.inf)
    assert problem in table([difference], 1.0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_not_finite_is_not_equal_even_where_others_are(wrong):
    sides = {"x": [torch.tensor([1.0])] * 2}, {"x": [torch.tensor([1.0]), torch.tensor([wrong])]}
    for a, b in (sides, sides[::-1], (sides[1], sides[1])):
        (difference,) = compare(a, b)
        assert not difference.within(1e9)


def test_any_difference_from_zero_or_between_indices_is_infinite():
    tiny = {"zero": [torch.tensor([1e-9])], "classes": [torch.tensor([1000, 7])]}
    reference = {"zero": [torch.zeros(1)], "classes": [torch.tensor([1000, 8])]}
    assert [x.relative for x in compare(reference, tiny)] == [math.inf, math.inf]


def test_of_masks_the_share_of_pixels_that_differ_counts():
    pixels = torch.zeros(2, 10, 50, dtype=torch.bool)
    pixels[0] = True  # 500 of 1000
    other = pixels.clone()
    other[1, 0, 0] = other[1, 0, 1] = True
    (difference,) = compare({"masks": [pixels]}, {"masks": [other]})
    assert (difference.absolute, difference.relative, difference.values) == (2.0, 2 / 500, 1000)
    (same,) = compare({"masks": [pixels]}, {"masks": [pixels.clone()]})
    assert (same.absolute, same.relative) == (0.0, 0.0)
    (one,) = compare({"masks": [~pixels[:1]]}, {"masks": [pixels[:1]]})
    assert one.relative == math.inf  # the reference has none


def test_table_has_a_verdict_in_every_line():
    differences = [Difference("good", 3, 1e-7, 1e-6), Difference("bad", 4, 0.5, 0.25)]
    lines = table(differences, 1e-4).splitlines()
    assert lines[2].split() == ["good", "3", "1.0e-07", "1.0e-06", "ok"]
    assert lines[3].split() == ["bad", "4", "5.0e-01", "2.5e-01", "above", "0.0001"]


def test_drawn_items():
    items = draw_items(64, 96, 3, num_classes=2, seed=0)
    assert [tuple(x["image"].shape) for x in items] == [(3, 64, 96), (3, 56, 84), (3, 48, 72)]
    for item in items:
        height, width = item["image"].shape[1:]
        assert (item["height"], item["width"]) == (2 * height, 2 * width)
        assert item["image"].dtype == torch.uint8
        x0, y0, x1, y1 = item["gt_boxes"].unbind(-1)
        assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= width).all() and (y1 <= height).all()
        assert (x1 - x0 > 4).all() and (y1 - y0 > 4).all()
        assert item["gt_classes"].max() < 2
        # The last rectangle drawn is of one colour, exactly as far as its box goes.
        x0, y0, x1, y1 = item["gt_boxes"][-1].int().tolist()
        assert item["image"][:, y0:y1, x0:x1].flatten(1).unique(dim=1).shape[1] == 1
        assert item["image"][:, y0:y1, x0 : x1 + 1].flatten(1).unique(dim=1).shape[1] > 1
    again = draw_items(64, 96, 3, num_classes=2, seed=0)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(items, again, strict=True))
    other = draw_items(64, 96, 3, num_classes=2, seed=1)
    assert not torch.equal(items[0]["image"], other[0]["image"])


def test_drawn_outlines_touch_the_sides_of_their_boxes():
    boxes = torch.tensor([[3.0, 4.0, 43.0, 24.0], [10.0, 0.0, 20.0, 30.0]])
    objects = draw_outlines(boxes, seed=0)
    for box, (outline,) in zip(boxes, objects, strict=True):
        points = torch.from_numpy(outline.reshape(-1, 2)).float()
        assert torch.cat([points.amin(0), points.amax(0)]).tolist() == box.tolist()
    filled = fill_outlines(objects, (40, 50))
    assert filled.shape == (2, 40, 50)
    for mask, (x0, y0, x1, y1) in zip(filled, boxes.int().tolist(), strict=True):
        area = (x1 - x0) * (y1 - y0)
        assert 0.4 * area < mask[y0:y1, x0:x1].sum() < 0.8 * area
        assert mask[y0:y1, x0:x1].sum() > 0.95 * mask.sum()


def test_drawn_keypoints_are_of_all_kinds():
    boxes = torch.tensor([[3.0, 4.0, 43.0, 24.0], [10.0, 0.0, 20.0, 30.0]])
    keypoints = draw_keypoints(boxes, 17, seed=0)
    assert keypoints.shape == (2, 17, 3)
    assert keypoints.dtype == torch.float32
    labelled = keypoints[..., 2] > 0
    assert keypoints[..., 2].unique().tolist() == [0, 1, 2]
    assert keypoints[~labelled].abs().sum() == 0
    inside = (keypoints[..., :2] >= boxes[:, None, :2]) & (keypoints[..., :2] <= boxes[:, None, 2:])
    assert 0.5 < inside.all(2)[labelled].float().mean() < 1


def test_drawn_dense_pose():
    first, second, third = draw_dense_pose(3, seed=0)
    assert third is None
    charts = torch.cat([first.charts, second.charts])
    assert charts.min() == 0
    assert charts.max() == 24
    for points in (first, second):
        assert len(points.charts.unique()) > 12
        assert 200 < points.x.max() < 256
        assert points.u.max() < 1
        assert points.parts.shape == (256, 256)
        assert len(points.parts.unique()) > 8
    assert not torch.equal(first.x, second.x)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_items_have_the_ground_truth_that_the_config_asks_for(mask_format):
    cfg = get_cfg()
    expected = draw_items(64, 96, 2, num_classes=80, seed=3)
    for a, b in zip(build_items(cfg, 64, 96, 2, seed=3), expected, strict=True):
        assert a.keys() == b.keys()
        assert torch.equal(a["image"], b["image"])
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = cfg.MODEL.DENSEPOSE_ON = True
    cfg.INPUT.MASK_FORMAT = mask_format
    for item in build_items(cfg, 64, 96, 2, seed=3):
        assert len(item["gt_masks"]) == len(item["gt_keypoints"]) == 3
        assert len(item["gt_densepose"]) == 3
        if mask_format == "bitmask":
            assert item["gt_masks"].shape == (3, *item["image"].shape[1:])


@pytest.fixture(scope="module")
def lively():
    """A small detector with all heads after `randomize_for_parity`, and what it was given."""
    path = CONFIGS / "quick" / "quickstart_R18_FPN.yaml"
    torch.manual_seed(0)
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu", *ALL_HEADS.split()])
    model = build_model(cfg)
    items = build_items(cfg, 64, 96, 2, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = {name for name in before if name.startswith("backbone.bottom_up.")}
    randomize_for_parity(model, items, before.keys() - kept, seed=0)
    return model, items, before, kept


def test_enlivened_detector_has_something_to_compare(lively):
    model, items, _, _ = lively
    spreads = {}

    def note(module, inputs, output):
        spreads.setdefault(names[module], output.std().item())

    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    for module in [m for m, name in names.items() if name in SPREADS]:
        module.register_forward_hook(note)
    with torch.no_grad():
        detections = model.eval()(items)
    assert spreads == pytest.approx(SPREADS, rel=0.01)
    assert all(len(x["boxes"]) > 10 for x in detections)
    assert len(torch.cat([x["classes"] for x in detections]).unique()) > 3


def test_enliven_changes_only_what_it_is_told_to(lively):
    model, _, before, kept = lively
    state = model.state_dict()
    running = ("running_mean", "running_var", "num_batches_tracked")  # of the forward pass
    for name in kept:
        if not name.endswith(running):
            assert torch.equal(state[name], before[name]), name
    assert not torch.equal(
        state["backbone.fpn_output2.norm.weight"], before["backbone.fpn_output2.norm.weight"]
    )
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
