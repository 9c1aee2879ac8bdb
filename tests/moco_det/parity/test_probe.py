"""What the engines' probes promise to those who compare and time with them."""

import pytest
import torch
from paths import CONFIGS
from torch import nn

from moco_det.engines import probe_class
from moco_det.parity.comparison import compare, draw_items
from moco_det.parity.probe import EngineProbe, by_layer, end_layers, of_surfaces

OPTS = ["MODEL.DEVICE", "cpu", "SOLVER.BASE_LR", "0.001"]


@pytest.fixture(scope="module", params=["native", "detectron2"])
def probe(request) -> EngineProbe:
    if request.param == "detectron2":
        pytest.importorskip("detectron2", reason="the plugin needs Detectron2")
    torch.manual_seed(0)
    return probe_class(request.param)(str(CONFIGS / "quick" / "quickstart_R18_FPN.yaml"), OPTS)


@pytest.fixture(scope="module")
def items():
    return draw_items(64, 96, 2, num_classes=8, seed=0)


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return all(map(torch.equal, a, b))


def test_quantities_leave_the_model_as_it_was(probe, items):
    before = copy_of(probe.model)
    first, second = probe.quantities(items, seed=0), probe.quantities(items, seed=0)
    assert list(first) == list(second)
    assert all(equal(first[name], second[name]) for name in first)
    assert equal(copy_of(probe.model).values(), before.values())
    other = probe.quantities(items, seed=1)
    assert torch.equal(other["features p2"][0], first["features p2"][0])
    assert other["loss_rpn_cls"] != first["loss_rpn_cls"]  # other anchors are sampled


def test_names_and_shapes_of_quantities(probe, items):
    found = probe.quantities(items, seed=0)
    maps = ["p2", "p3", "p4", "p5", "p6"]
    kinds = ("features", "RPN logits on", "RPN deltas on")
    assert {f"{kind} {name}" for kind in kinds for name in maps} <= found.keys()
    assert found["features p2"][0].shape == (2, 64, 16, 24)
    assert found["RPN logits on p3"][0].shape == (2, 3, 8, 12)
    assert found["RPN deltas on p3"][0].shape == (2, 12, 8, 12)
    assert len(found["proposal boxes"]) == len(found["detection boxes"]) == 2
    for boxes, scores in zip(found["proposal boxes"], found["proposal scores"], strict=True):
        assert boxes.shape == (len(scores), 4)
        assert (scores.diff() <= 0).all()
    parameters = by_layer(dict(probe.model.named_parameters()))
    after = found["parameters after a step"]
    assert [len(x) for x in after] == [len(x) for x in parameters.values()]
    assert sum(map(len, after)) == sum(x.numel() for x in probe.model.parameters())
    # The gradients are those of the step: SGD's first one is lr * (gradient + decay * weight).
    (gradient,) = found["gradient of backbone.bottom_up.stem.conv1"]
    weights = dict(zip(parameters, after, strict=True))
    start = probe.model.state_dict()["backbone.bottom_up.stem.conv1.weight"]
    step = start - weights["backbone.bottom_up.stem.conv1"].view_as(start)
    expected = 0.001 * (gradient.view_as(start) + 1e-4 * start)
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-7)
    last = probe.model.roi_heads.box_predictor.bbox_pred
    (gradient,) = found["gradient of roi_heads.box_predictor.bbox_pred"]
    assert len(gradient) == last.weight.numel() + last.bias.numel()


@pytest.mark.parametrize("amp", [False, True])
def test_a_step_trains_and_inference_does_not(probe, items, amp):
    before = copy_of(probe.model)
    (detections,) = probe.infer(items[:1], amp)
    assert detections is not None
    assert equal(copy_of(probe.model).values(), before.values())
    probe.train_step(items, amp)
    after = copy_of(probe.model)
    assert all(value.isfinite().all() for value in after.values())
    for name in (
        "backbone.bottom_up.stem.conv1.weight",
        "roi_heads.box_predictor.cls_score.weight",
    ):
        assert after[name].dtype == torch.float32
        assert not torch.equal(after[name], before[name])


def test_what_is_compared_of_surfaces():
    surface = torch.zeros(3, 2, 2, dtype=torch.uint8)
    surface[:, 0, 1] = torch.tensor([24, 255, 51])
    found = of_surfaces([[surface, torch.zeros(3, 1, 4, dtype=torch.uint8)], []])
    charts, none = found["detection charts"]
    assert charts.shape == (25, 8)
    assert charts[24].tolist() == [False, True, *[False] * 6]
    assert charts.sum() == 8
    assert none.shape == (25, 0)
    torch.testing.assert_close(found["mean U and V"][0], torch.tensor([1 / 8, 0.2 / 8]))
    assert found["mean U and V"][1].tolist() == [0, 0]


class Heatmap(EngineProbe):
    """The smallest model with a bias whose gradient is 0 but for rounding: a softmax over cells.

    `error` is added to that gradient, as another order of summation would.
    """

    def __init__(self, error: float):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
        nn.init.zeros_(model[1].bias)
        super().__init__(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model[1].bias.register_hook(lambda gradient: gradient + error)

    def outputs(self, items):
        return {}

    def losses(self, items):
        images = torch.stack([x["image"] for x in items]).to(self.model[0].weight)
        logits = self.model(images / 255).flatten(2).flatten(0, 1)
        return {"loss": nn.functional.cross_entropy(logits, torch.arange(len(logits)))}

    def proposals(self, items, stages):
        raise NotImplementedError

    def detections(self, results, stages):
        raise NotImplementedError


@pytest.mark.parametrize(("error", "same"), [(1e-15, True), (1e-2, False)])
def test_a_gradient_that_is_zero_is_compared_on_the_scale_of_its_layer(error, same):
    items = [{"image": torch.arange(192, dtype=torch.uint8).view(3, 8, 8)}]
    reference = Heatmap(0.0).quantities(items, seed=0)
    assert reference["gradient of 1"][0][-2:].abs().max() < 1e-14
    differences = compare(reference, Heatmap(error).quantities(items, seed=0))
    names = ("gradient of 1", "parameters after a step")
    found = {x.quantity: x.within(1e-6) for x in differences}
    assert {name: found[name] for name in names} == dict.fromkeys(names, same)


def test_end_layers_are_in_the_order_of_computation():
    head = "roi_heads.box_predictor.bbox_pred"
    fpn = ["backbone.fpn_lateral2.weight", "backbone.bottom_up.stem.conv1.weight", f"{head}.bias"]
    assert end_layers(fpn) == ("backbone.bottom_up.stem.conv1", head)
    assert end_layers(["backbone.res4.0.conv1.weight", f"{head}.bias"]) == (
        "backbone.res4.0.conv1",
        head,
    )
