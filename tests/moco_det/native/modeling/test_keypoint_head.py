"""The keypoint branch against hand values, slow loops, and Detectron2's functions where it is."""

import pytest
import torch
import torch.nn.functional as F

from moco_det.native.modeling.boxes import SampledProposals
from moco_det.native.modeling.keypoint_head import (
    KRCNNConvDeconvUpsampleHead,
    heatmaps_to_keypoints,
    keypoint_cells,
    select_with_visible_keypoints,
)


def make_head(keypoints_per_image=None, loss_weight=1.0) -> KRCNNConvDeconvUpsampleHead:
    torch.manual_seed(0)
    return KRCNNConvDeconvUpsampleHead(4, 3, (6, 5), loss_weight, keypoints_per_image)


def samples_of(boxes, matched) -> SampledProposals:
    count = sum(map(len, boxes))
    matched = [torch.tensor(index, dtype=torch.int64) for index in matched]
    return SampledProposals(boxes, torch.zeros(count).long(), torch.zeros(count, 4), matched)


BOX = [10.0, 20.0, 18.0, 24.0]  # 8 x 4 pixels


@pytest.mark.parametrize(
    ("point", "cell"),
    [
        ((10.0, 20.0, 2), 0),
        ((11.9, 20.5, 1), 0),  # cells are 2 wide and 1 high
        ((12.0, 20.9, 2), 1),
        ((15.0, 23.5, 2), 3 * 4 + 2),
        ((18.0, 24.0, 2), 3 * 4 + 3),  # the far corner belongs to the last cell
        ((18.0, 20.0, 2), 3),
        ((18.1, 22.0, 2), None),
        ((9.9, 22.0, 2), None),
        ((14.0, 24.1, 2), None),
        ((15.0, 23.5, 0), None),  # not labelled
    ],
)
def test_cells_by_hand(point, cell):
    cells, valid = keypoint_cells(torch.tensor([[point]]), torch.tensor([BOX]), 4)
    assert cells.dtype == torch.int64
    assert valid.item() == (cell is not None)
    if cell is not None:
        assert cells.item() == cell


def test_regions_that_hold_a_labelled_keypoint():
    inside, beyond = [12.0, 21.0], [12.0, 25.0]
    keypoints = [
        torch.tensor(
            [
                [[*inside, 2.0], [*beyond, 2.0]],
                [[*inside, 0.0], [*beyond, 2.0]],  # the one that is inside is not labelled
                [[*beyond, 2.0], [*inside, 1.0]],  # hidden, but labelled
            ]
        ),
        torch.zeros(0, 2, 3),
        torch.tensor([[[10.0, 24.0, 1.0], [0.0, 0.0, 0.0]]]),  # at the border
    ]
    boxes = torch.tensor([BOX])
    samples = samples_of(
        [boxes.repeat(4, 1), boxes[:0], boxes.repeat(2, 1)], [[1, 0, 2, 1], [], [0, 0]]
    )
    samples = samples._replace(classes=torch.arange(6))
    kept = select_with_visible_keypoints(samples, keypoints)
    assert kept.classes.tolist() == [1, 2, 4, 5]
    assert [index.tolist() for index in kept.matched] == [[0, 2], [], [0, 0]]


def test_layers_and_initialisation():
    head = make_head()
    layers = ["conv_fcn1", "conv_fcn2", "score_lowres"]
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert [name for name, _ in head.named_parameters()] == names
    assert head(torch.randn(2, 4, 7, 7)).shape == (2, 3, 28, 28)
    assert head.score_lowres.bias.abs().sum() == 0
    wide = KRCNNConvDeconvUpsampleHead(64, 3, (64,), 1.0, None)
    # He's initialisation over the outputs: 2 / (64 * 3 * 3).
    assert wide.conv_fcn1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.02)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("per_image", "weight"), [(None, 1.0), (12.0, 3.0)])
def test_loss_equals_a_slow_loop(per_image, weight):
    head = make_head(per_image, weight)
    x = torch.randn(3, 4, 2, 2)
    boxes = [torch.tensor([[0.0, 0.0, 16.0, 16.0], [4.0, 4.0, 12.0, 12.0]]), torch.tensor([BOX])]
    keypoints = [
        torch.tensor([[[1.0, 3.0, 2.0], [0.0, 0.0, 0.0], [9.0, 9.0, 1.0]]]),
        torch.tensor([[[0.0] * 3] * 3, [[14.0, 22.0, 2.0], [40.0, 22.0, 2.0], [15.0, 22.5, 1.0]]]),
    ]
    heatmaps = head(x)
    # (region, keypoint, row, column) of those that are labelled and in their region; cells of the
    # 8 x 8 grid are 2 pixels wide in the first box, 1 in the others but for their height of 0.5.
    targets = [(0, 0, 1, 0), (0, 2, 4, 4), (1, 2, 5, 5), (2, 0, 4, 4), (2, 2, 5, 5)]
    losses = [
        -heatmaps[r, k].flatten().log_softmax(0).view(8, 8)[row, column]
        for r, k, row, column in targets
    ]
    expected = weight * sum(losses) / (5 if per_image is None else 2 * per_image)
    found = head.losses(x, samples_of(boxes, [[0, 0], [1]]), keypoints)
    torch.testing.assert_close(found, {"loss_keypoint": expected})


@pytest.mark.parametrize("per_image", [None, 12.0])
@pytest.mark.parametrize("regions", [0, 2])
def test_without_a_keypoint_the_loss_is_zero_and_has_gradients(regions, per_image):
    head = make_head(per_image)
    samples = samples_of([torch.tensor([BOX]).repeat(regions, 1)], [[0] * regions])
    x = torch.zeros(regions, 4, 7, 7, requires_grad=True)
    losses = head.losses(x, samples, [torch.zeros(1, 3, 3)])
    assert losses == {"loss_keypoint": 0}
    losses["loss_keypoint"].backward()
    assert x.grad is not None
    assert all(p.grad.abs().sum() == 0 for p in head.parameters())


def test_keypoints_of_heatmaps_by_hand():
    """A box of as many pixels as cells: the centre of the largest cell, with its probability."""
    heatmaps = torch.randn((1, 2, 8, 8), generator=torch.Generator().manual_seed(0))
    heatmaps[0, 0, 5, 2] = heatmaps[0, 1, 0, 7] = 4.0
    (found,) = heatmaps_to_keypoints(heatmaps, torch.tensor([[100.5, 50.25, 108.5, 58.25]]))
    assert found[:, :2].tolist() == [[103.0, 55.75], [108.0, 50.75]]
    softmax = heatmaps.flatten(2).softmax(2)[0]
    torch.testing.assert_close(found[:, 2], softmax[torch.arange(2), [5 * 8 + 2, 7]])


def test_keypoints_come_back_from_their_cells():
    """Round trip: a peak in the cell of a point is found within half a cell of the point."""
    boxes = torch.tensor([[3.3, 7.1, 80.9, 31.4], [0.0, 0.0, 17.2, 40.0]])
    share = torch.rand((2, 4, 2), generator=torch.Generator().manual_seed(0))
    corner, opposite = boxes[:, None].split([2, 2], dim=2)
    points = corner + share * (opposite - corner)
    cells, valid = keypoint_cells(torch.cat([points, 2 + 0 * share[..., :1]], 2), boxes, 16)
    assert valid.all()
    heatmaps = 9.0 * F.one_hot(cells, 256).view(2, 4, 16, 16).float()
    found = heatmaps_to_keypoints(heatmaps, boxes)
    # And within half a pixel of the grid that the heatmap is resized to.
    size = opposite - corner
    allowed = 0.5 * size / 16 + 0.5 * size / size.ceil() + 1e-4
    assert ((found[..., :2] - points).abs() <= allowed).all()


def test_no_detection_has_no_keypoints():
    assert heatmaps_to_keypoints(torch.zeros(0, 3, 8, 8), torch.zeros(0, 4)).shape == (0, 3, 3)


def test_cells_and_keypoints_are_detectron2_s():
    structures = pytest.importorskip("detectron2.structures", reason="compares with Detectron2")
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand((30, 2), generator=generator) * 50
    boxes = torch.cat([corner, corner + torch.rand((30, 2), generator=generator) ** 2 * 60], 1)
    points = torch.rand((30, 5, 2), generator=generator) * 100
    points[:, 0], points[:, 1] = boxes[:, :2], boxes[:, 2:]
    visibility = torch.randint(3, (30, 5, 1), generator=generator)
    keypoints = torch.cat([points, visibility], dim=2)
    cells, valid = keypoint_cells(keypoints, boxes, 56)
    expected, expected_valid = structures.Keypoints(keypoints).to_heatmap(boxes, 56)
    assert torch.equal(valid, expected_valid.bool())
    assert torch.equal(cells[valid], expected[valid])
    assert 20 < valid.sum() < 100

    heatmaps = 3 * torch.randn((30, 5, 14, 14), generator=generator)
    expected = structures.heatmaps_to_keypoints(heatmaps, boxes)[..., [0, 1, 3]]
    torch.testing.assert_close(heatmaps_to_keypoints(heatmaps, boxes), expected)
