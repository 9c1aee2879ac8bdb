"""Arithmetic by hand; matching and drawing against slow rules; sampled proposals by hand."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from moco_det.native.modeling import boxes as boxes_module
from moco_det.native.modeling.boxes import (
    SCALE_CLAMP,
    ProposalSampler,
    SampledProposals,
    Targets,
    batched_nms,
    best_of_each,
    decode,
    encode,
    match,
    nonempty,
    pairwise_iou,
    positions,
    spread_apart,
    subsample_labels,
)
from moco_det.native.modeling.layers import kernels_of

UNIT = (1.0, 1.0, 1.0, 1.0)
HEAD = (10.0, 10.0, 5.0, 5.0)


def random_boxes(n: int, seed: int, size: float = 100.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * size
    return torch.cat([corner, corner + 1 + torch.rand(n, 2, generator=generator) * size], dim=1)


def test_encode_by_hand():
    box = torch.tensor([[10.0, 20.0, 30.0, 60.0]])  # centre (20, 40), 20 x 40
    target = torch.tensor([[20.0, 20.0, 60.0, 40.0]])  # centre (40, 30), 40 x 20
    expected = torch.tensor([[20 / 20, -10 / 40, math.log(2), -math.log(2)]])
    torch.testing.assert_close(encode(box, target, UNIT), expected)
    weighted = expected * torch.tensor(HEAD)
    torch.testing.assert_close(encode(box, target, HEAD), weighted)


def test_decode_inverts_encode():
    boxes, targets = random_boxes(50, 0), random_boxes(50, 1)
    torch.testing.assert_close(decode(encode(boxes, targets, HEAD), boxes, HEAD), targets)


def test_decode_broadcasts_one_box_over_its_classes():
    boxes, deltas = random_boxes(6, 0), torch.randn(6, 3, 4)
    together = decode(deltas, boxes[:, None], HEAD)
    for k in range(3):
        assert torch.equal(together[:, k], decode(deltas[:, k], boxes, HEAD))


def test_decode_clamps_growth_and_not_shrinking():
    box = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    grown = decode(torch.tensor([[0.0, 0.0, 50.0, SCALE_CLAMP + 1e-3]]), box, UNIT)
    torch.testing.assert_close(grown, torch.tensor([[-492.0, -492.0, 508.0, 508.0]]))
    shrunk = decode(torch.tensor([[0.0, 0.0, -100.0, 0.0]]), box, UNIT)
    torch.testing.assert_close(shrunk, torch.tensor([[8.0, 0.0, 8.0, 16.0]]))


def test_decode_is_float32_for_half_precision_deltas():
    box = torch.tensor([[1000.0, 1000.0, 1001.0, 1001.0]])
    decoded = decode(torch.zeros(1, 4, dtype=torch.float16), box, UNIT)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, box)


def test_nonempty_is_strict():
    boxes = torch.tensor(
        [[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 3.0], [5.0, 5.0, 5.0, 9.0], [4.0, 4.0, 3.0, 9.0]]
    )
    assert nonempty(boxes).tolist() == [True, True, False, False]
    assert nonempty(boxes, 2.0).tolist() == [False, False, False, False]
    assert nonempty(boxes + torch.tensor([0.0, 0.0, 1.0, 0.0]), 2.0).tolist() == [
        False,
        True,
        False,
        False,
    ]


def test_pairwise_iou_by_hand():
    gt = torch.tensor([[0.0, 0.0, 10.0, 10.0], [3.0, 3.0, 3.0, 3.0]])
    boxes = torch.tensor(
        [[5.0, 0.0, 15.0, 10.0], [20.0, 20.0, 30.0, 30.0], [0.0, 0.0, 10.0, 5.0], [3.0] * 4]
    )
    expected = torch.tensor([[1 / 3, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(pairwise_iou(gt, boxes), expected)


# -- of many boxes, some --------------------------------------------------------------------------


def slow_nms(boxes, scores, groups, counts, threshold) -> list[bool]:
    """Greedy, image by image and group by group."""
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    kept = [False] * len(boxes)
    for index in scores.argsort(descending=True, stable=True).tolist():
        rivals = torch.tensor(kept) & (groups == groups[index]) & (image == image[index])
        overlaps = box_iou(boxes[index : index + 1], boxes[rivals])
        kept[index] = not (overlaps > threshold).any()
    return kept


@pytest.mark.parametrize("most", [0, 60, 1000])  # boxes at once
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nms_of_several_images_equals_slow_rules(monkeypatch, device, kind, most):
    monkeypatch.setattr(boxes_module, "MOST_AT_ONCE", most)
    counts = [50, 0, 7, 40]
    boxes, groups = random_boxes(97, 3), torch.arange(97) % 3
    scores = (torch.rand(97, generator=torch.Generator().manual_seed(4)) * 10).round()  # ties
    expected = slow_nms(boxes, scores, groups, counts, 0.3)
    assert 30 < sum(expected) < 80
    with kernels_of(kind):
        some = (x.to(device) for x in (boxes, scores, groups))
        assert batched_nms(*some, 3, counts, 0.3).tolist() == expected
        none = batched_nms(boxes[:0], scores[:0], groups[:0], 3, [0, 0], 0.3)
    assert none.shape == (0,)


def test_groups_are_spread_apart_near_to_0():
    boxes, groups = random_boxes(200, 5), torch.arange(200) % 10
    spread = spread_apart(boxes, groups, 10)
    together = box_iou(spread, spread) > 0
    assert not together[groups[:, None] != groups].any()
    sides = boxes[:, 2:] - boxes[:, :2]
    torch.testing.assert_close(spread[:, 2:] - spread[:, :2], sides, rtol=0, atol=1e-4)
    assert spread.abs().max() < 2.5 * (boxes.max() + 1)  # ten in a row would reach to 10


def test_positions_of_a_mask_row_by_row():
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, True]])
    assert [x.tolist() for x in positions(mask)] == [[1, 2], [], [0, 2]]


def test_the_best_of_each_image():
    scores = torch.tensor([0.3, 0.9, 0.9, 0.8]), torch.tensor([-1.0, -2.0]), torch.zeros(0)
    kept = [torch.tensor([True, True, True, False]), torch.tensor([True] * 2), torch.zeros(0) > 0]
    assert [x.tolist() for x in best_of_each(scores, kept, 2)] == [[1, 2], [0, 1], []]
    assert [x.tolist() for x in best_of_each(scores, kept, -1)] == [[1, 2, 0], [0, 1], []]
    assert [x.tolist() for x in best_of_each(scores, kept, 0)] == [[], [], []]


# -- matching and drawing -------------------------------------------------------------------------


def slow_match(iou, low, high, allow_low_quality):
    """Faster R-CNN's rules for the RPN, box by box."""
    num_gt, num_boxes = iou.shape
    matched, labels = [], []
    for n in range(num_boxes):
        column = [iou[m, n].item() for m in range(num_gt)]
        best = max(column)
        matched.append(column.index(best))
        label = 1 if best >= high else 0 if best < low else -1
        if allow_low_quality:
            for m in range(num_gt):
                if column[m] == max(iou[m].tolist()):
                    label = 1
        labels.append(label)
    return matched, labels


@pytest.mark.parametrize("allow_low_quality", [False, True])
def test_match_equals_the_slow_rules(allow_low_quality):
    gt, boxes = random_boxes(4, 5), random_boxes(200, 6)
    iou = pairwise_iou(gt, boxes)
    matched, labels = match(iou, [0.3, 0.7], [0, -1, 1], allow_low_quality)
    expected_matched, expected_labels = slow_match(iou, 0.3, 0.7, allow_low_quality)
    assert matched.tolist() == expected_matched
    assert labels.tolist() == expected_labels
    assert set(expected_labels) == {-1, 0, 1} or not allow_low_quality


def test_match_at_the_thresholds():
    iou = torch.tensor([[0.29, 0.3, 0.69, 0.7, 1.0]])
    _, labels = match(iou, [0.3, 0.7], [0, -1, 1], allow_low_quality_matches=False)
    assert labels.tolist() == [0, -1, -1, 1, 1]
    _, labels = match(iou, [0.5], [0, 1], allow_low_quality_matches=False)
    assert labels.tolist() == [0, 0, 1, 1, 1]


def test_low_quality_match_keeps_the_ground_truth_it_overlaps_most():
    # Box 0 is the best for both ground truths; it is an object, and belongs to the second.
    iou = torch.tensor([[0.2, 0.1], [0.6, 0.9]])
    matched, labels = match(iou, [0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)
    assert matched.tolist() == [1, 1]
    assert labels.tolist() == [1, 1]


def test_match_without_ground_truth():
    matched, labels = match(torch.zeros(0, 3), [0.3, 0.7], [0, -1, 1], True)
    assert matched.tolist() == [0, 0, 0]
    assert labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("num_positive", "num_negative", "expected"),
    [(100, 1000, (64, 192)), (10, 1000, (10, 246)), (100, 30, (64, 30)), (0, 20, (0, 20))],
)
def test_subsample_counts(num_positive, num_negative, expected):
    """A quarter of 256 at most are positive; negatives fill up, positives do not."""
    labels = torch.cat(
        [torch.full((num_positive,), 3), torch.full((num_negative,), 9), torch.full((50,), -1)]
    )
    labels = labels[torch.randperm(len(labels))]
    ((positive, negative),) = subsample_labels([labels], 256, 0.25, background=9)
    assert (len(positive), len(negative)) == expected
    assert (labels[positive] == 3).all()
    assert (labels[negative] == 9).all()
    assert len(set(positive.tolist() + negative.tolist())) == sum(expected)


def test_subsample_draws_positives_then_negatives():
    """The order of the random draws is part of the contract with Detectron2."""
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 0, -1])
    torch.manual_seed(3)
    images = subsample_labels([labels, labels[:3], labels[:0]], 4, 0.5, background=0)
    torch.manual_seed(3)
    (positive, negative), (second_positive, second_negative), nothing = images
    assert positive.tolist() == torch.tensor([1, 3, 4])[torch.randperm(3)[:2]].tolist()
    assert negative.tolist() == torch.tensor([0, 2, 5, 6])[torch.randperm(4)[:2]].tolist()
    assert second_positive.tolist() == torch.tensor([1])[torch.randperm(1)].tolist()
    assert second_negative.tolist() == torch.tensor([0, 2])[torch.randperm(2)].tolist()
    assert [x.tolist() for x in nothing] == [[], []]


def test_subsample_is_uniform():
    labels = torch.zeros(10, dtype=torch.int8)
    torch.manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        ((_, negative),) = subsample_labels([labels], 5, 0.5, background=0)
        counts[negative] += 1
    # 2000 draws of probability 1/2: standard deviation 22.
    assert (counts - 1000).abs().max() < 100


def make_sampler(**changes) -> ProposalSampler:
    settings = {
        "num_classes": 3,
        "iou_thresholds": [0.5],
        "iou_labels": [0, 1],
        "batch_size_per_image": 16,
        "positive_fraction": 0.25,
        "append_gt": True,
    }
    return ProposalSampler(**(settings | changes))


def boxes_near(centre: float, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = centre + 20 * torch.rand(n, 2, generator=generator)
    return torch.cat([corner, corner + 5 + 40 * torch.rand(n, 2, generator=generator)], dim=1)


GT_BOXES = torch.tensor([[10.0, 10.0, 40.0, 40.0], [30.0, 30.0, 60.0, 70.0]])
GT_CLASSES = torch.tensor([2, 0])


def test_samples_are_labelled_by_overlap():
    torch.manual_seed(0)
    proposals = torch.cat([boxes_near(5, 60, 0), boxes_near(25, 60, 1)])
    samples = make_sampler()([proposals], Targets([GT_BOXES], [GT_CLASSES]))
    assert {len(x) for x in (samples.boxes[0], *samples[1:3], samples.matched[0])} == {16}
    foreground = samples.classes < 3
    assert foreground.sum() == 4  # a quarter, there are more
    rows = zip(*(samples.boxes[0], *samples[1:3], samples.matched[0]), strict=True)
    for box, label, target, matched in rows:
        overlap, index = box_iou(GT_BOXES, box[None])[:, 0].max(dim=0)
        assert label == (GT_CLASSES[index] if overlap >= 0.5 else 3)
        if label < 3:
            assert torch.equal(target, GT_BOXES[index])
            assert matched == index


@pytest.mark.parametrize(("append_gt", "positives"), [(True, 2), (False, 0)])
def test_ground_truth_is_proposed(append_gt, positives):
    far = torch.tensor([[200.0, 200.0, 220.0, 220.0]]).repeat(20, 1)
    samples = make_sampler(append_gt=append_gt)([far], Targets([GT_BOXES], [GT_CLASSES]))
    assert sorted(samples.classes[samples.classes < 3].tolist()) == [0, 2][:positives]
    assert len(samples.classes) == 16


def test_ground_truth_comes_after_the_proposals_and_foreground_before_background():
    """In Detectron2's order, with which a seed draws the same regions in both engines."""
    proposals = torch.cat([GT_BOXES + 1, boxes_near(150, 20, 0)])
    sampler = make_sampler(batch_size_per_image=8, positive_fraction=0.375)
    torch.manual_seed(3)
    samples = sampler([proposals], Targets([GT_BOXES], [GT_CLASSES]))
    torch.manual_seed(3)
    foreground, background = torch.tensor([0, 1, 22, 23]), torch.arange(2, 22)
    drawn = [foreground[torch.randperm(4)[:3]], background[torch.randperm(20)[:5]]]
    expected = torch.cat([proposals, GT_BOXES])[torch.cat(drawn)]
    assert torch.equal(samples.boxes[0], expected)


def test_image_without_objects_gives_background_only():
    empty = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    samples = make_sampler()(
        [boxes_near(5, 30, 0), boxes_near(5, 5, 1)], Targets([empty[0]] * 2, [empty[1]] * 2)
    )
    assert [len(b) for b in samples.boxes] == [16, 5]
    assert samples.classes.tolist() == [3] * 21


def test_ignored_overlaps_are_not_drawn():
    sampler = make_sampler(iou_thresholds=[0.3, 0.5], iou_labels=[0, -1, 1], append_gt=False)
    proposals = torch.tensor(
        [[10.0, 10.0, 40.0, 40.0], [10.0, 10.0, 40.0, 22.0], [10.0, 10.0, 40.0, 14.0]]
    )  # IoU 1, 0.4 and 0.13
    samples = sampler([proposals], Targets([GT_BOXES[:1]], [GT_CLASSES[:1]]))
    assert torch.equal(samples.boxes[0], proposals[[0, 2]])
    assert samples.classes.tolist() == [2, 3]


def test_sampling_leaves_the_ground_truth_alone():
    classes = GT_CLASSES.clone()
    make_sampler()([boxes_near(5, 30, 0)], Targets([GT_BOXES], [classes]))
    assert torch.equal(classes, GT_CLASSES)


def test_regions_are_kept_image_by_image():
    boxes = [torch.arange(12.0).reshape(3, 4), torch.zeros(0, 4), torch.arange(8.0).reshape(2, 4)]
    samples = SampledProposals(
        boxes,
        torch.tensor([3, 0, 3, 1, 2]),
        torch.cat(boxes) + 1,
        [torch.tensor([7, 8, 9]), torch.tensor([]).long(), torch.tensor([5, 6])],
    )
    kept = samples.where(samples.classes < 2)
    assert [b.tolist() for b in kept.boxes] == [[[4, 5, 6, 7]], [], [[0, 1, 2, 3]]]
    assert kept.classes.tolist() == [0, 1]
    assert kept.gt_boxes.tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert [m.tolist() for m in kept.matched] == [[8], [], [5]]
    assert [len(b) for b in kept.where(torch.tensor([False, False])).boxes] == [0, 0, 0]
    copy = samples.on_host()
    assert [b.tolist() for b in copy.boxes] == [b.tolist() for b in boxes]
    assert [m.tolist() for m in copy.matched] == [[7, 8, 9], [], [5, 6]]
    assert torch.equal(copy.classes, samples.classes)
    assert torch.equal(copy.gt_boxes, samples.gt_boxes)
