"""Region sampling, pooling, losses and detections against hand values and slow loops."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from moco_det.config import get_cfg
from moco_det.native.pooling import RegionPooler
from moco_det.native.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    RegionSampler,
    RegionSamples,
    Res5ROIHeads,
    build_res5,
)


def make_sampler(**changes) -> RegionSampler:
    settings = {
        "num_classes": 3,
        "iou_thresholds": [0.5],
        "iou_labels": [0, 1],
        "batch_size_per_image": 16,
        "positive_fraction": 0.25,
        "append_gt": True,
    }
    return RegionSampler(**(settings | changes))


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


def boxes_near(centre: float, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = centre + 20 * torch.rand(n, 2, generator=generator)
    return torch.cat([corner, corner + 5 + 40 * torch.rand(n, 2, generator=generator)], dim=1)


GT_BOXES = torch.tensor([[10.0, 10.0, 40.0, 40.0], [30.0, 30.0, 60.0, 70.0]])
GT_CLASSES = torch.tensor([2, 0])


def test_samples_are_labelled_by_overlap():
    torch.manual_seed(0)
    proposals = torch.cat([boxes_near(5, 60, 0), boxes_near(25, 60, 1)])
    samples = make_sampler()([proposals], [GT_BOXES], [GT_CLASSES])
    assert len(samples.boxes[0]) == len(samples.classes) == len(samples.gt_boxes) == 16
    foreground = samples.classes < 3
    assert foreground.sum() == 4  # a quarter, there are more
    for box, label, target in zip(samples.boxes[0], samples.classes, samples.gt_boxes, strict=True):
        overlap, index = box_iou(GT_BOXES, box[None])[:, 0].max(dim=0)
        assert label == (GT_CLASSES[index] if overlap >= 0.5 else 3)
        if label < 3:
            assert torch.equal(target, GT_BOXES[index])


@pytest.mark.parametrize(("append_gt", "positives"), [(True, 2), (False, 0)])
def test_ground_truth_is_proposed(append_gt, positives):
    far = torch.tensor([[200.0, 200.0, 220.0, 220.0]]).repeat(20, 1)
    samples = make_sampler(append_gt=append_gt)([far], [GT_BOXES], [GT_CLASSES])
    assert sorted(samples.classes[samples.classes < 3].tolist()) == [0, 2][:positives]
    assert len(samples.classes) == 16


def test_image_without_objects_gives_background_only():
    empty = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    samples = make_sampler()(
        [boxes_near(5, 30, 0), boxes_near(5, 5, 1)], [empty[0], empty[0]], [empty[1], empty[1]]
    )
    assert [len(b) for b in samples.boxes] == [16, 5]
    assert samples.classes.tolist() == [3] * 21


def test_ignored_overlaps_are_not_drawn():
    sampler = make_sampler(iou_thresholds=[0.3, 0.5], iou_labels=[0, -1, 1], append_gt=False)
    proposals = torch.tensor(
        [[10.0, 10.0, 40.0, 40.0], [10.0, 10.0, 40.0, 22.0], [10.0, 10.0, 40.0, 14.0]]
    )  # IoU 1, 0.4 and 0.13
    samples = sampler([proposals], [GT_BOXES[:1]], [GT_CLASSES[:1]])
    assert torch.equal(samples.boxes[0], proposals[[0, 2]])
    assert samples.classes.tolist() == [2, 3]


def test_sampling_leaves_the_ground_truth_alone():
    classes = GT_CLASSES.clone()
    make_sampler()([boxes_near(5, 30, 0)], [GT_BOXES], [classes])
    assert torch.equal(classes, GT_CLASSES)


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
    losses = predictor.losses(
        logits, deltas, RegionSamples([boxes[:1], boxes[1:]], classes, targets)
    )
    expected = -(math.log(0.5) + math.log(0.8) + math.log(0.25)) / 3
    assert losses["loss_cls"].item() == pytest.approx(expected)
    expected = 3 * (1 + 1 + 1 + 5 * math.log(2) + 0.5) / 3
    assert losses["loss_box_reg"].item() == pytest.approx(expected)


def test_class_agnostic_boxes():
    predictor = make_predictor(num_classes=3, class_agnostic=True)
    logits, deltas = predictor(torch.randn(4, 6))
    assert deltas.shape == (4, 1, 4)
    boxes = boxes_near(5, 4, 0)
    samples = RegionSamples([boxes], torch.tensor([0, 1, 2, 3]), boxes)
    losses = predictor.losses(logits, torch.ones_like(deltas), samples)
    assert losses["loss_box_reg"].item() == pytest.approx(3 * 4 / 4)
    assert predictor.detect(logits, deltas, [boxes], [(100, 100)])[0]["boxes"].shape[1] == 4


def test_no_region_at_all_costs_nothing():
    predictor = make_predictor()
    logits, deltas = predictor(torch.zeros(0, 6))
    none = RegionSamples([torch.zeros(0, 4)], torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
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


def test_detections_equal_slow_rules():
    torch.manual_seed(0)
    proposals = boxes_near(5, 40, 3), boxes_near(20, 30, 4)
    logits = 2 * torch.randn(70, 4)
    predictor = make_predictor(num_classes=3, score_thresh=0.2, detections_per_image=12)
    sizes = [(50, 45), (60, 70)]
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


def test_extra_norm_of_moco_follows_res5():
    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16, 4
    plain, extra = (build_res5(cfg, extra_norm=flag) for flag in (False, True))
    assert set(extra.state_dict()) - set(plain.state_dict()) == {
        f"norm.{k}"
        for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    pooled = torch.randn(6, 64, 6, 6)
    out = extra(pooled)
    assert out.shape == (6, 128, 3, 3)
    torch.testing.assert_close(out.mean(dim=(0, 2, 3)), torch.zeros(128), rtol=0, atol=1e-4)
    assert out.min() < 0  # nothing rectifies it


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_convolving_before_pooling_changes_nothing(stride_in_1x1):
    """The oracle is the definition: pool each region, then run res5 on it."""
    torch.manual_seed(0)
    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = "BN", stride_in_1x1
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16, 4
    res5 = build_res5(cfg, extra_norm=True).double()  # in float32 a ReLU may take another side
    pooler = RegionPooler(6, [16], sampling_ratio=0)
    heads = Res5ROIHeads(
        res5=res5, box_predictor=None, in_features=["res4"], sampler=None, pooler=pooler
    )
    maps, boxes = [torch.randn(2, 64, 9, 7).double()], [boxes_near(50, 12, 0), boxes_near(70, 8, 1)]

    def gradients(features):
        res5.zero_grad()
        features.square().sum().backward()
        return [p.grad.clone() for p in res5.parameters()]

    found = heads.region_features(maps, boxes)
    expected = res5(pooler(maps, boxes)).mean(dim=(2, 3))
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(found), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs)
