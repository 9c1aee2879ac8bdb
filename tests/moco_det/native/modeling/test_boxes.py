"""Box arithmetic against hand-computed values and slow loops."""

import math

import pytest
import torch

from moco_det.native.modeling.boxes import (
    SCALE_CLAMP,
    decode,
    encode,
    match,
    nonempty,
    pairwise_iou,
    subsample,
)

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
    positive, negative = subsample(labels, 256, 0.25, background=9)
    assert (len(positive), len(negative)) == expected
    assert (labels[positive] == 3).all()
    assert (labels[negative] == 9).all()
    assert len(set(positive.tolist() + negative.tolist())) == sum(expected)


def test_subsample_draws_positives_then_negatives():
    """The order of the random draws is part of the contract with Detectron2."""
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 0, -1])
    torch.manual_seed(3)
    positive, negative = subsample(labels, 4, 0.5, background=0)
    torch.manual_seed(3)
    assert positive.tolist() == torch.tensor([1, 3, 4])[torch.randperm(3)[:2]].tolist()
    assert negative.tolist() == torch.tensor([0, 2, 5, 6])[torch.randperm(4)[:2]].tolist()


def test_subsample_is_uniform():
    labels = torch.zeros(10, dtype=torch.int8)
    torch.manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        counts[subsample(labels, 5, 0.5, background=0)[1]] += 1
    # 2000 draws of probability 1/2: standard deviation 22.
    assert (counts - 1000).abs().max() < 100
