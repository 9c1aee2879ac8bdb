"""The dense pose head's shapes, and surfaces against slow loops and DensePose's own conversion."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moco_det.common.errors import UserError
from moco_det.config.loading import get_cfg
from moco_det.native.modeling.densepose_head import (
    Charts,
    DensePoseChartPredictor,
    DensePoseV1ConvXHead,
    build_densepose_head,
    build_densepose_predictor,
    surfaces,
)
from moco_det.native.modeling.rcnn import rescale

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
    found = rescale(detections, (20, 40), (40, 80))
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
