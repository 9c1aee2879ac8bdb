"""Box arithmetic by hand and against slow loops; anchors against Detectron2's tables."""

import math

import pytest
import record_anchors
import torch
from recording import read

from moco_det.native.modeling.boxes import (
    SCALE_CLAMP,
    AnchorGenerator,
    cell_anchors,
    decode,
    encode,
    nonempty,
    pairwise_iou,
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


# -- anchors --------------------------------------------------------------------------------------

# Detectron2, tests/modeling/test_anchor_generator.py: sizes 32 and 64, height / width 1/4, 1, 4,
# on a map of 1 x 2 pixels with stride 4.
DETECTRON2 = torch.tensor(
    [
        [-32.0, -8.0, 32.0, 8.0],
        [-16.0, -16.0, 16.0, 16.0],
        [-8.0, -32.0, 8.0, 32.0],
        [-64.0, -16.0, 64.0, 16.0],
        [-32.0, -32.0, 32.0, 32.0],
        [-16.0, -64.0, 16.0, 64.0],
        [-28.0, -8.0, 36.0, 8.0],
        [-12.0, -16.0, 20.0, 16.0],
        [-4.0, -32.0, 12.0, 32.0],
        [-60.0, -16.0, 68.0, 16.0],
        [-28.0, -32.0, 36.0, 32.0],
        [-12.0, -64.0, 20.0, 64.0],
    ]
)


@pytest.mark.parametrize("nested", [False, True])
def test_values_of_detectron2(nested):
    sizes, ratios = [32, 64], [0.25, 1, 4]
    generator = AnchorGenerator([sizes] if nested else sizes, ratios, strides=[4])
    (anchors,) = generator([torch.zeros(2, 96, 1, 2)])
    torch.testing.assert_close(anchors, DETECTRON2)


@pytest.mark.parametrize("case", record_anchors.CASES)
def test_tables_recorded_from_detectron2(case):
    options = record_anchors.CASES[case]
    generator = AnchorGenerator(options["sizes"], options["aspect_ratios"], options["strides"])
    found = generator(record_anchors.feature_maps(case))
    for anchors, expected in zip(found, read("anchors")[case], strict=True):
        torch.testing.assert_close(anchors, torch.tensor(expected), rtol=1e-6, atol=1e-5)


def test_offset_moves_all_anchors_by_its_share_of_the_stride():
    (anchors,) = AnchorGenerator([32, 64], [0.25, 1, 4], [4], offset=0.5)([torch.zeros(1, 1, 1, 2)])
    torch.testing.assert_close(anchors, DETECTRON2 + 2)


def test_areas_and_ratios_are_not_rounded():
    x0, y0, x1, y1 = cell_anchors([32, 100], [0.5, 1.0, 2.0]).unbind(1)
    torch.testing.assert_close((x1 - x0) * (y1 - y0), torch.tensor([1024.0] * 3 + [10000.0] * 3))
    torch.testing.assert_close((y1 - y0) / (x1 - x0), torch.tensor([0.5, 1.0, 2.0] * 2))
    torch.testing.assert_close(x0, -x1)


def test_levels_have_their_own_sizes_and_strides():
    generator = AnchorGenerator([[32], [64]], [[0.5, 1.0, 2.0]], strides=[4, 8])
    assert generator.num_anchors == 3
    fine, coarse = generator([torch.zeros(1, 1, 4, 6), torch.zeros(1, 1, 2, 3)])
    assert fine.shape == (4 * 6 * 3, 4)
    assert coarse.shape == (2 * 3 * 3, 4)
    # Row 1, column 2, the square anchor: centre (2, 1) * stride.
    assert fine[(1 * 6 + 2) * 3 + 1].tolist() == [8 - 16, 4 - 16, 8 + 16, 4 + 16]
    assert coarse[(1 * 3 + 2) * 3 + 1].tolist() == [16 - 32, 8 - 32, 16 + 32, 8 + 32]


def test_nothing_of_it_is_in_the_checkpoint():
    assert AnchorGenerator([32], [1.0], [4]).state_dict() == {}


def test_lists_that_do_not_fit_the_levels():
    with pytest.raises(ValueError, match="3 lists of anchor sizes for 2 feature maps"):
        AnchorGenerator([[32], [64], [128]], [1.0], strides=[4, 8])
    with pytest.raises(ValueError, match="different numbers of anchors"):
        _ = AnchorGenerator([[32], [64, 128]], [1.0], strides=[4, 8]).num_anchors
