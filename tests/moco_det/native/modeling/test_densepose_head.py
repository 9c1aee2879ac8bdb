"""Dense pose: shapes; loss and surfaces against slow loops, by hand, and DensePose's own."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moco_det.common.errors import UserError
from moco_det.config.loading import get_cfg
from moco_det.densepose.points import DensePosePoints
from moco_det.native.modeling.boxes import SampledProposals
from moco_det.native.modeling.densepose_head import (
    Charts,
    DensePoseChartLoss,
    DensePoseChartPredictor,
    DensePoseV1ConvXHead,
    build_densepose_head,
    build_densepose_predictor,
    matched_points,
    resample_parts,
    select_with_densepose,
    surfaces,
)
from moco_det.native.modeling.meta_arch import detector_postprocess

BOXES = torch.tensor([[3.2, 4.9, 15.1, 24.0], [0.0, 0.0, 0.6, 9.99], [7.0, 7.0, 8.0, 8.0]])


def make_charts(count, side=8, coarse=3, seed=0) -> Charts:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.randn((count, coarse + 75, side, side), generator=generator)
    return Charts(*smooth.split([coarse, 25, 25, 25], dim=1))


def test_shapes_names_and_initialisation():
    torch.manual_seed(0)
    head = DensePoseV1ConvXHead(6, num_convs=2, dim=8, kernel_size=3)
    predictor = DensePoseChartPredictor(head.out_channels, 15, kernel_size=4, up_scale=2)
    charts = predictor(head(torch.randn(3, 6, 7, 7)))
    shapes = [tuple(x.shape) for x in (charts.coarse, charts.fine, charts.u, charts.v)]
    assert shapes == [(3, 15, 28, 28), *[(3, 25, 28, 28)] * 3]
    assert list(head.state_dict()) == [
        f"body_conv_fcn{k}.{name}" for k in (1, 2) for name in ("weight", "bias")
    ]
    layers = ("ann_index_lowres", "index_uv_lowres", "u_lowres", "v_lowres")
    assert list(predictor.state_dict()) == [f"{x}.{y}" for x in layers for y in ("weight", "bias")]
    assert not any(p.any() for n, p in predictor.named_parameters() if n.endswith("bias"))
    spread = head.body_conv_fcn2.weight.std().item()
    assert spread == pytest.approx((2 / (8 * 9)) ** 0.5, rel=0.1)  # He et al., of the outputs


def test_no_region():
    head = DensePoseV1ConvXHead(4, num_convs=1, dim=4, kernel_size=3)
    predictor = DensePoseChartPredictor(4, 2, kernel_size=4, up_scale=2)
    charts = predictor(head(torch.zeros(0, 4, 7, 7)))
    assert charts.coarse.shape == (0, 2, 28, 28)
    assert surfaces(charts, torch.zeros(0, 4)) == []


def test_charts_are_dealt_out_as_tensors_are():
    charts = make_charts(5)
    first, second = charts.split([2, 3])
    assert torch.equal(second.u, charts.u[2:])
    kept = second[torch.tensor([True, False, True])]
    assert torch.equal(kept.fine, charts.fine[[2, 4]])
    assert len(first.v) == 2


def slow_surface(charts: Charts, index: int, width: int, height: int) -> np.ndarray:
    def resized(x):
        return F.interpolate(x[index : index + 1], (height, width), mode="bilinear")[0]

    coarse, fine, u, v = map(resized, (charts.coarse, charts.fine, charts.u, charts.v))
    surface = np.zeros((3, height, width), dtype=np.uint8)
    for row in range(height):
        for column in range(width):
            if coarse[:, row, column].argmax() == 0:
                continue
            chart = int(fine[:, row, column].argmax())
            if chart:
                uv = [min(max(x[chart, row, column].item() * 255, 0), 255) for x in (u, v)]
                surface[:, row, column] = chart, *map(int, uv)
    return surface


def test_surfaces_pixel_by_pixel():
    charts = make_charts(3)
    found = surfaces(charts, BOXES)
    sizes = [(11, 19), (1, 9), (1, 1)]  # rounded down, at least 1
    for index, (surface, (width, height)) in enumerate(zip(found, sizes, strict=True)):
        assert surface.dtype == torch.uint8
        assert surface.shape == (3, height, width)
        assert np.array_equal(surface.numpy(), slow_surface(charts, index, width, height))
    assert {0, *range(1, 25)} >= set(found[0][0].unique().tolist()) > {0}


def test_surfaces_are_densepose_s():
    converters = pytest.importorskip("densepose.converters")
    structures = pytest.importorskip("densepose.structures")
    boxes = pytest.importorskip("detectron2.structures").Boxes(BOXES)
    charts = make_charts(3, seed=1)
    theirs = structures.DensePoseChartPredictorOutput(
        charts.coarse, charts.fine, charts.u, charts.v
    )
    for index, found in enumerate(surfaces(charts, BOXES)):
        result = converters.ToChartResultConverter.convert(theirs[index], boxes[index])
        expected = structures.quantize_densepose_chart_result(result).labels_uv_uint8
        assert torch.equal(found, expected)


def test_surfaces_are_made_on_the_original_image():
    """Twice as large; the second box is empty there, and its charts go with it."""
    boxes = torch.tensor([[2.0, 3.0, 6.0, 9.0], [50.0, 3.0, 60.0, 9.0], [1.0, 1.0, 4.0, 3.0]])
    charts = make_charts(3)
    detections = {
        "boxes": boxes,
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "classes": torch.zeros(3).long(),
        "charts": charts,
    }
    (found,) = detector_postprocess([detections], [(20, 40)], [(40, 80)])
    assert [x.shape[1:] for x in found["densepose"]] == [(12, 8), (4, 6)]
    assert "charts" not in found
    expected = slow_surface(charts, 2, 6, 4)
    assert np.array_equal(found["densepose"][1].numpy(), expected)


def make_cfg(**changed):
    head = get_cfg().MODEL.ROI_DENSEPOSE_HEAD.clone()
    cfg = get_cfg()
    supported = {"NAME": "DensePoseV1ConvXHead", "DECODER_ON": False}
    head.update(supported | changed)
    cfg.MODEL.ROI_DENSEPOSE_HEAD = head
    return cfg


def test_built_as_configured():
    cfg = make_cfg(NUM_STACKED_CONVS=3, CONV_HEAD_DIM=8, NUM_COARSE_SEGM_CHANNELS=15)
    head = build_densepose_head(cfg, 4)
    assert len(head.state_dict()) == 6
    assert head.out_channels == 8
    predictor = build_densepose_predictor(cfg, head.out_channels)
    assert predictor.ann_index_lowres.weight.shape == (8, 15, 4, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"NAME": ""}, "set it to 'DensePoseV1ConvXHead'"),
        ({"DECODER_ON": True}, "DECODER_ON True: the native engine has no decoder"),
        ({"POOLER_RESOLUTION": 14}, "HEATMAP_SIZE is 112, but .* is 56"),
    ],
)
def test_what_cannot_be_built(changed, message):
    with pytest.raises(UserError, match=message):
        build_densepose_head(make_cfg(**changed), 4)


# -- loss -----------------------------------------------------------------------------------------

SIDE = 12
GT_BOXES = [
    torch.tensor([[10.0, 12.0, 60.0, 70.0], [40.5, 8.25, 120.0, 90.0]]),
    torch.tensor([[5.0, 20.0, 65.0, 75.0]]),
]
# Regions: two of the first object, one of the second, two of the third; one of them hardly on it.
PROPOSALS = [
    torch.tensor([[9.0, 13.0, 58.0, 71.0], [14.0, 12.0, 62.0, 66.0], [40.0, 10.0, 119.0, 95.0]]),
    torch.tensor([[5.0, 20.0, 65.0, 75.0], [40.0, 40.0, 90.0, 90.0]]),
]
MATCHED = [torch.tensor([0, 0, 1]), torch.tensor([0, 0])]
LOSS = DensePoseChartLoss(index_weight=2.0, part_weight=0.3, point_weight=0.1)


def make_points(seed, count=15, with_parts=True) -> DensePosePoints:
    random = np.random.RandomState(seed)
    x, y, u, v = torch.from_numpy(random.uniform(size=(4, count))).float()
    charts = torch.from_numpy(random.randint(0, 25, count)).long()
    parts = torch.from_numpy(np.kron(random.randint(0, 15, (16, 16)), np.ones((16, 16))))
    return DensePosePoints(x * 256, y * 256, charts, u, v, parts.byte() if with_parts else None)


def make_samples() -> SampledProposals:
    gt_boxes = [boxes[index] for boxes, index in zip(GT_BOXES, MATCHED, strict=True)]
    return SampledProposals(PROPOSALS, torch.zeros(5).long(), torch.cat(gt_boxes), MATCHED)


def make_predictions(count, coarse=15, requires_grad=False) -> Charts:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn((count, coarse + 75, SIDE, SIDE), generator=generator)
    fields = values.split([coarse, 25, 25, 25], dim=1)
    return Charts(*(x.clone().requires_grad_(requires_grad) for x in fields))


def bilinear(grid: torch.Tensor, x: float, y: float) -> float:
    """Values at integer positions; the last one beyond them."""
    x0, y0 = min(int(x), SIDE - 1), min(int(y), SIDE - 1)
    x1, y1 = min(x0 + 1, SIDE - 1), min(y0 + 1, SIDE - 1)
    fx, fy = min(x, x1) - x0, min(y, y1) - y0
    top = grid[y0, x0] * (1 - fx) + grid[y0, x1] * fx
    return float(top * (1 - fy) + (grid[y1, x0] * (1 - fx) + grid[y1, x1] * fx) * fy)


def smooth_l1(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def slow_losses(charts: Charts, samples: SampledProposals, points) -> dict[str, float]:
    u_loss = v_loss = 0.0
    entropies, coarse_losses = [], []
    boxes = torch.cat(samples.boxes).tolist()
    objects = matched_points(samples, points)
    for r, (box, gt, found) in enumerate(
        zip(boxes, samples.gt_boxes.tolist(), objects, strict=True)
    ):
        sides, gt_sides = (box[2] - box[0], box[3] - box[1]), (gt[2] - gt[0], gt[3] - gt[1])
        for x, y, chart, u, v in zip(
            *(t.tolist() for t in (found.x, found.y, found.charts, found.u, found.v)), strict=True
        ):
            at = gt[0] + x * gt_sides[0] / 256 - box[0], gt[1] + y * gt_sides[1] / 256 - box[1]
            if not all(0 <= a < side for a, side in zip(at, sides, strict=True)):
                continue
            gx, gy = (a * SIDE / side for a, side in zip(at, sides, strict=True))
            logits = [bilinear(charts.fine[r, c], gx, gy) for c in range(25)]
            entropies.append(math.log(sum(map(math.exp, logits))) - logits[chart])
            if chart:
                u_loss += smooth_l1(bilinear(charts.u[r, chart], gx, gy) - u)
                v_loss += smooth_l1(bilinear(charts.v[r, chart], gx, gy) - v)
        target = torch.zeros(SIDE, SIDE).long()
        for row in range(SIDE):
            for column in range(SIDE):
                x = (box[0] + column / SIDE * sides[0] - gt[0]) / gt_sides[0] * 255
                y = (box[1] + row / SIDE * sides[1] - gt[1]) / gt_sides[1] * 255
                x, y = round(x), round(y)
                if 0 <= x <= 255 and 0 <= y <= 255:
                    target[row, column] = int(found.parts[y, x])
        if charts.coarse.shape[1] == 2:
            target = (target > 0).long()
        coarse_losses.append(F.cross_entropy(charts.coarse[r][None], target[None]).item())
    return {
        "loss_densepose_U": 0.1 * u_loss,
        "loss_densepose_V": 0.1 * v_loss,
        "loss_densepose_I": 0.3 * sum(entropies) / len(entropies),
        "loss_densepose_S": 2.0 * sum(coarse_losses) / len(coarse_losses),
    }


@pytest.mark.parametrize("coarse", [2, 15])
def test_losses_point_by_point(coarse):
    points = [[make_points(0), make_points(1)], [make_points(2)]]
    samples = make_samples()
    charts = make_predictions(5, coarse)
    found = LOSS(charts, samples, points)
    expected = slow_losses(charts, samples, points)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-5), name
        assert value > 0


def test_regions_that_are_trained_on():
    """Not those beside their object, nor those of an object that is not annotated."""
    points = [[make_points(0), None], [make_points(2)]]
    kept = select_with_densepose(make_samples(), points, 0.7)
    assert [len(boxes) for boxes in kept.boxes] == [2, 1]
    assert torch.equal(kept.boxes[1], PROPOSALS[1][:1])
    assert [m.tolist() for m in kept.matched] == [[0, 0], [0]]
    exact = select_with_densepose(make_samples(), points, 1.0)  # more than the threshold, not equal
    assert sum(map(len, exact.boxes)) == 0


def empty_samples() -> SampledProposals:
    none = torch.zeros(0).long()
    return SampledProposals([torch.zeros(0, 4)] * 2, none, torch.zeros(0, 4), [none] * 2)


def far_points() -> DensePosePoints:
    """At the object's upper left corner, which no region of this test holds."""
    one = torch.ones(1)
    parts = torch.zeros(256, 256, dtype=torch.uint8)
    return DensePosePoints(0 * one, 0 * one, one.long(), one, one, parts)


def no_points() -> DensePosePoints:
    nothing = torch.zeros(0)
    return DensePosePoints(nothing, nothing, nothing.long(), nothing, nothing, None)


@pytest.mark.parametrize("kind", ["no region", "no point", "no point inside", "background only"])
def test_nothing_to_learn_is_zero_with_gradients(kind):
    samples = make_samples()
    points = [[make_points(0), make_points(1)], [make_points(2)]]
    if kind == "no region":
        samples = empty_samples()
    elif kind == "no point":
        points = [[no_points()] * 2, [no_points()]]
    elif kind == "no point inside":
        inner = torch.tensor([[20.0, 22.0, 60.0, 70.0]])
        samples = SampledProposals(
            [inner, inner], torch.zeros(2).long(), GT_BOXES[0][[0, 0]], [torch.tensor([0])] * 2
        )
        points = [[far_points()], [far_points()]]
    else:
        points = [[make_points(s) for s in (0, 1)], [make_points(2)]]
        for of_image in points:
            for found in of_image:
                found.charts.zero_()
    charts = make_predictions(sum(map(len, samples.boxes)), requires_grad=True)
    losses = LOSS(charts, samples, points)
    assert len(losses) == 4
    assert all(loss.item() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(not x.grad.any() for x in (charts.coarse, charts.fine, charts.u, charts.v))


def test_without_parts_of_one_object_there_is_no_coarse_loss():
    points = [[make_points(0), make_points(1)], [make_points(2, with_parts=False)]]
    losses = LOSS(make_predictions(5), make_samples(), points)
    assert losses["loss_densepose_S"] == 0
    assert losses["loss_densepose_I"] > 0


def test_parts_by_hand():
    """The left half of the object is of part 3; the region is its middle half."""
    parts = torch.zeros(1, 256, 256, dtype=torch.uint8)
    parts[:, :, :128] = 3
    gt, region = torch.tensor([[0.0, 0.0, 80.0, 80.0]]), torch.tensor([[20.0, 20.0, 60.0, 60.0]])
    found = resample_parts(parts, gt, region, 4)
    assert found.tolist() == [[[3, 3, 0, 0]] * 4]
    beyond = resample_parts(parts, gt, torch.tensor([[-40.0, -40.0, 40.0, 40.0]]), 4)
    assert beyond.tolist() == [[[0] * 4, [0] * 4, [0, 0, 3, 3], [0, 0, 3, 3]]]


@pytest.mark.parametrize("coarse", [2, 15])
def test_losses_are_densepose_s(coarse):
    """Filter and loss of the project, on the same regions; one object is not annotated."""
    densepose = pytest.importorskip("densepose")
    modeling = pytest.importorskip("densepose.modeling.build")
    structures = pytest.importorskip("detectron2.structures")
    get_detectron2_cfg = pytest.importorskip("detectron2.config").get_cfg
    from moco_det.plugin.probe import ground_truth

    cfg = get_detectron2_cfg()
    densepose.add_densepose_config(cfg)
    head = cfg.MODEL.ROI_DENSEPOSE_HEAD
    head.NUM_COARSE_SEGM_CHANNELS, head.HEATMAP_SIZE = coarse, SIDE
    head.INDEX_WEIGHTS, head.PART_WEIGHTS, head.POINT_REGRESSION_WEIGHTS = 2.0, 0.3, 0.1
    points = [[make_points(0), None], [make_points(2)]]
    proposals = []
    for boxes, matched, gt_boxes, of_image in zip(
        PROPOSALS, MATCHED, GT_BOXES, points, strict=True
    ):
        truth = structures.Instances((100, 130), gt_boxes=structures.Boxes(gt_boxes))
        truth.gt_densepose = ground_truth(of_image, truth)
        found = truth[matched]
        found.proposal_boxes = structures.Boxes(boxes)
        proposals.append(found)
    _, proposals = modeling.build_densepose_data_filter(cfg)([], proposals)
    samples = select_with_densepose(make_samples(), points, head.FG_IOU_THRESHOLD)
    for found, boxes in zip(proposals, samples.boxes, strict=True):
        assert torch.equal(found.proposal_boxes.tensor, boxes)
    charts = make_predictions(3, coarse)
    predicted = densepose.structures.DensePoseChartPredictorOutput(
        charts.coarse, charts.fine, charts.u, charts.v
    )
    expected = modeling.build_densepose_losses(cfg)(proposals, predicted)
    losses = LOSS(charts, samples, points)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6)
