"""Losses and detections of the box branch against hand values and slow loops."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from moco_det.native.modeling.box_head import FastRCNNConvFCHead, FastRCNNOutputLayers
from moco_det.native.modeling.boxes import SampledProposals
from moco_det.native.modeling.layers import kernels_of


def make_predictor(num_classes=2, in_features=6, **changes) -> FastRCNNOutputLayers:
    settings = {
        "class_agnostic": False,
        "box_weights": (10.0, 10.0, 5.0, 5.0),
        "smooth_l1_beta": 0.0,
        "box_loss_weight": 1.0,
        "score_thresh": 0.05,
        "nms_thresh": 0.5,
        "detections_per_image": 100,
    }
    return FastRCNNOutputLayers(in_features, num_classes, **(settings | changes))


def samples_of(boxes, classes, gt_boxes) -> SampledProposals:
    return SampledProposals(boxes, classes, gt_boxes, [torch.zeros(len(b)).long() for b in boxes])


def boxes_near(centre: float, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = centre + 20 * torch.rand(n, 2, generator=generator)
    return torch.cat([corner, corner + 5 + 40 * torch.rand(n, 2, generator=generator)], dim=1)


@pytest.mark.usefixtures("float64")
def test_losses_by_hand():
    predictor = make_predictor(num_classes=2, box_loss_weight=3.0)
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 20.0, 20.0], [5.0, 5.0, 9.0, 9.0]])
    # The first is to move by half its width and to double its height, the last is to stay.
    targets = torch.tensor([[5.0, -5.0, 15.0, 15.0], [0.0] * 4, [5.0, 5.0, 9.0, 9.0]])
    classes = torch.tensor([1, 2, 0])
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.25, 0.5, 0.25]]))
    deltas = torch.zeros(3, 2, 4)
    deltas[0, 1] = torch.tensor([4.0, 1.0, -1.0, 0.0])  # wanted (5, 0, 0, 5 log 2)
    deltas[0, 0] = deltas[1] = 99.0  # of other classes, of background: no matter
    deltas[2, 0, 0] = 0.5
    losses = predictor.losses(logits, deltas, samples_of([boxes[:1], boxes[1:]], classes, targets))
    expected = -(math.log(0.5) + math.log(0.8) + math.log(0.25)) / 3
    assert losses["loss_cls"].item() == pytest.approx(expected)
    expected = 3 * (1 + 1 + 1 + 5 * math.log(2) + 0.5) / 3
    assert losses["loss_box_reg"].item() == pytest.approx(expected)


def test_class_agnostic_boxes():
    predictor = make_predictor(num_classes=3, class_agnostic=True)
    logits, deltas = predictor(torch.randn(4, 6))
    assert deltas.shape == (4, 1, 4)
    boxes = boxes_near(5, 4, 0)
    samples = samples_of([boxes], torch.tensor([0, 1, 2, 3]), boxes)
    losses = predictor.losses(logits, torch.ones_like(deltas), samples)
    assert losses["loss_box_reg"].item() == pytest.approx(3 * 4 / 4)
    assert predictor.detect(logits, deltas, [boxes], [(100, 100)])[0]["boxes"].shape[1] == 4


def test_no_region_at_all_costs_nothing():
    predictor = make_predictor()
    logits, deltas = predictor(torch.zeros(0, 6))
    none = samples_of([torch.zeros(0, 4)], torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    losses = predictor.losses(logits, deltas, none)
    assert losses == {"loss_cls": 0, "loss_box_reg": 0}
    sum(losses.values()).backward()
    (found,) = predictor.detect(logits, deltas, [torch.zeros(0, 4)], [(10, 10)])
    assert [len(x) for x in found.values()] == [0, 0, 0]


def slow_detections(boxes, probabilities, size, score_thresh, nms_thresh, limit):
    """Class by class, greedily, over boxes that already are where they are to be."""
    found = []
    for k in range(probabilities.shape[1] - 1):
        kept = []
        for index in probabilities[:, k].argsort(descending=True).tolist():
            score = probabilities[index, k].item()
            box = boxes[index].clone()
            box[0::2].clamp_(0, size[1])
            box[1::2].clamp_(0, size[0])
            if score > score_thresh and all(
                box_iou(box[None], other[None]) <= nms_thresh for _, other, _ in kept
            ):
                kept.append((score, box, k))
        found += kept
    return sorted(found, key=lambda item: -item[0])[:limit]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_detections_equal_slow_rules(kind):
    torch.manual_seed(0)
    proposals = boxes_near(5, 40, 3), boxes_near(20, 30, 4)
    logits = 2 * torch.randn(70, 4)
    predictor = make_predictor(num_classes=3, score_thresh=0.2, detections_per_image=12)
    sizes = [(50, 45), (60, 70)]
    with kernels_of(kind):
        found = predictor.detect(logits, torch.zeros(70, 3, 4), list(proposals), sizes)
    probabilities = logits.softmax(dim=1).split([40, 30])
    counts = []
    for result, boxes, probability, size in zip(
        found, proposals, probabilities, sizes, strict=True
    ):
        expected = slow_detections(boxes, probability, size, 0.2, 0.5, 12)
        counts.append(len(expected))
        torch.testing.assert_close(result["scores"], torch.tensor([e[0] for e in expected]))
        torch.testing.assert_close(result["boxes"], torch.stack([e[1] for e in expected]))
        assert result["classes"].tolist() == [e[2] for e in expected]
    assert max(counts) == 12
    everything = make_predictor(num_classes=3, score_thresh=0.0, detections_per_image=-1)
    assert (
        len(everything.detect(logits, torch.zeros(70, 3, 4), list(proposals), sizes)[0]["boxes"])
        > 12
    )


@pytest.mark.usefixtures("float64")
def test_each_class_refines_its_own_box():
    predictor = make_predictor(num_classes=2, nms_thresh=1.0)
    deltas = torch.zeros(1, 2, 4)
    deltas[0, 1, 0] = 10.0  # class 1: one width to the right
    logits = torch.log(torch.tensor([[0.3, 0.6, 0.1]]))
    proposal = torch.tensor([[10.0, 10.0, 20.0, 30.0]])
    (found,) = predictor.detect(logits, deltas, [proposal], [(100, 100)])
    assert found["classes"].tolist() == [1, 0]
    torch.testing.assert_close(
        found["boxes"], torch.tensor([[20.0, 10.0, 30.0, 30.0], [10.0, 10.0, 20.0, 30.0]])
    )


def test_regions_that_are_not_finite_are_no_detections():
    predictor = make_predictor()
    logits, deltas = torch.zeros(3, 3), torch.zeros(3, 2, 4)
    logits[0, 0], deltas[1, 0, 0] = float("nan"), float("inf")
    (found,) = predictor.detect(logits, deltas, [boxes_near(5, 3, 0)], [(100, 100)])
    assert len(found["boxes"]) == 2  # the third region, as either class


def test_box_head_layers():
    head = FastRCNNConvFCHead(8, 5, conv_dims=[4, 6], fc_dims=[16], norm="BN")
    assert set(head.state_dict()) >= {"conv1.weight", "conv2.norm.running_var", "fc1.bias"}
    assert head.out_features == 16
    assert (head(torch.randn(3, 8, 5, 5)) >= 0).all()
    convolutions_only = FastRCNNConvFCHead(8, 5, conv_dims=[4], fc_dims=[], norm="")
    assert convolutions_only.out_features == 4 * 25
    assert convolutions_only(torch.zeros(2, 8, 5, 5)).shape == (2, 100)


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, 6), (0.15, 5), (0.45, 2), (0.9, 0)])
def test_detections_score_above_the_threshold(threshold, kept):
    """Far boxes, so that nothing is suppressed: by hand, each class of each proposal by itself."""
    probabilities = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.3, 0.4, 0.3]])
    proposals = torch.tensor([[0.0, 0.0, 9.0, 9.0], [20, 20, 29, 29], [40, 40, 49, 49]])
    predictor = make_predictor(num_classes=2, score_thresh=threshold)
    deltas = torch.zeros(3, 2, 4)
    (found,) = predictor.detect(probabilities.log(), deltas, [proposals], [(60, 60)])
    expected = sorted(p for p in probabilities[:, :2].flatten().tolist() if p > threshold)
    assert found["scores"].tolist() == pytest.approx(expected[::-1])
    assert len(found["scores"]) == kept
