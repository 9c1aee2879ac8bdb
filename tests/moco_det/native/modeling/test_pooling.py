"""Pooling of regions: torchvision's operator is the oracle, and hand values."""

import itertools

import pytest
import torch
import torchvision

from moco_det.native.modeling.layers import kernels_of
from moco_det.native.modeling.pooling import ROIPooler, assign_levels, roi_align

HEIGHT, WIDTH, SCALE = 13, 17, 1 / 8


def feature_map(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, 3, HEIGHT, WIDTH), generator=generator).to(dtype).requires_grad_()


def regions(count=40):
    """Large and tiny ones, some of them reaching over the borders of the image or beyond it."""
    generator = torch.Generator().manual_seed(1)
    size = torch.tensor([WIDTH, HEIGHT]) / SCALE
    corner = (torch.rand((count, 2), generator=generator) * 1.4 - 0.2) * size
    side = torch.rand((count, 2), generator=generator) ** 3 * size
    image = torch.randint(2, (count, 1), generator=generator).float()
    boxes = torch.cat([image, corner, corner + side], dim=1)
    boxes[0, 1:] = torch.tensor([0, 0, *size])  # the whole image
    boxes[1, 3:] = boxes[1, 1:3]  # nothing
    boxes[3, 1:] = torch.tensor([-40, 5, size[0] + 900, 6])  # thin: bins of many columns
    boxes[4, 1:] = torch.tensor([9, -300, 9.5, size[1]])
    boxes[2, 1:] = torch.tensor([*(size - 4), *(size + 30)])
    return boxes


@pytest.mark.parametrize(
    ("bins", "sampling_ratio", "every", "aligned"),
    [
        *itertools.product([1, 7, 14], [0, 1, 2], [1, 2, 3], [True]),
        *itertools.product([1, 7], [0, 2], [1], [False]),
    ],
)
def test_equals_torchvision_s_operator_and_its_gradient(bins, sampling_ratio, every, aligned):
    feature, expected_feature = feature_map(torch.float32), feature_map(torch.float32)
    pooled = roi_align(feature, regions(), bins, SCALE, sampling_ratio, every, aligned)
    expected = torchvision.ops.roi_align(
        expected_feature, regions(), bins, SCALE, sampling_ratio, aligned=aligned
    )[:, :, ::every, ::every]
    torch.testing.assert_close(pooled, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (pooled * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(feature.grad, expected_feature.grad)


def pyramid_and_boxes(device, dtype):
    """Four levels, the coarsest of which no box is for, and an image without boxes."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(3, 4, 256 >> i, 192 >> i, generator=generator) for i in range(4)]
    maps = [x.to(device, dtype).requires_grad_() for x in maps]
    boxes = regions(60)[:, 1:] * torch.tensor([4.0, 6.0, 4.0, 6.0])
    boxes = boxes[assign_levels(boxes, 2, 5) < 5]
    return maps, [x.to(device) for x in (boxes[:45], boxes[:0], boxes[45:])]


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_both_kernels_pool_the_same(device, dtype, sampling_ratio):
    """The one of GPUs, on each device, against the one of CPUs; forward and gradients."""
    results = []
    for kind, where in (("cpu", "cpu"), ("cuda", device)):
        maps, boxes = pyramid_and_boxes(where, dtype)
        levels = assign_levels(torch.cat(boxes), 2, 5)
        assert set(levels.tolist()) == {2, 3, 4}
        with kernels_of(kind):
            pooled = ROIPooler(7, [4, 8, 16, 32], sampling_ratio)(maps, boxes)
        assert pooled.dtype == dtype
        weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
        (pooled * weight.to(where)).sum().backward()
        results.append([pooled.detach().cpu(), *(x.grad.cpu() for x in maps)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert not results[1][-1].any()  # no box is pooled from the coarsest
    with kernels_of("cuda"):
        none = ROIPooler(7, [4, 8, 16, 32], sampling_ratio)(maps, [b[:0] for b in boxes])
    assert none.shape == (0, 4, 7, 7)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_reduced_precision_is_summed_in_float32(kind):
    feature = feature_map(torch.bfloat16)
    with kernels_of(kind):
        pooled = roi_align(feature, regions(), 7, SCALE)
    exact = torchvision.ops.roi_align(feature.float(), regions(), 7, SCALE, 0, aligned=True)
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, exact.bfloat16()) or (pooled - exact).abs().max() < 2e-2
    pooled.sum().backward()
    assert feature.grad.dtype == torch.bfloat16


def test_no_region_gives_no_gradient():
    feature = feature_map(torch.float32)
    pooled = roi_align(feature, torch.zeros(0, 5), 7, SCALE)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert not feature.grad.any()


@pytest.mark.parametrize(
    ("side", "level"),
    [(224, 4), (223.9, 3), (112, 3), (111.9, 2), (10, 2), (448, 5), (2000, 5), (0, 2)],
)
def test_level_of_a_box(side, level):
    """FPN, equation 1: floor(4 + log2(side / 224)), within p2 ... p5."""
    box = torch.tensor([[100.0, 50.0, 100.0 + side, 50.0 + side]])
    assert assign_levels(box, 2, 5).tolist() == [level]


def test_pooler_takes_each_region_from_its_level():
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 128, 128), torch.randn(2, 3, 64, 64)]
    boxes = [
        torch.tensor([[10.0, 20.0, 300.0, 260.0], [7.5, 3.0, 90.0, 60.0]]),  # levels 4 -> 3, 2
        torch.tensor([[100.0, 100.0, 180.0, 400.0]]),  # level 3
    ]
    pooled = ROIPooler(5, [4, 8], sampling_ratio=0)(maps, boxes)
    expected = [
        torchvision.ops.roi_align(maps[1], [boxes[0][:1], boxes[1]], 5, 1 / 8, 0, True),
        torchvision.ops.roi_align(maps[0], [boxes[0][1:], boxes[1][:0]], 5, 1 / 4, 0, True),
    ]
    torch.testing.assert_close(pooled[[0, 2]], expected[0])
    torch.testing.assert_close(pooled[[1]], expected[1])
    none = ROIPooler(5, [4, 8], 0)(maps, [torch.zeros(0, 4)] * 2)
    assert none.shape == (0, 3, 5, 5)


def test_pooling_by_hand():
    """Pixel centres are at half-integers: a ramp pools to its values at the bins' centres."""
    ramp = torch.arange(16.0).add(0.5).repeat(16, 1)[None, None]  # value = x, in map pixels
    pooled = ROIPooler(2, [4], sampling_ratio=0)([ramp], [torch.tensor([[8.0, 8.0, 40.0, 24.0]])])
    # In map pixels the box spans x from 2 to 10: bins are 4 wide, with centres 4 and 8.
    torch.testing.assert_close(pooled[0, 0], torch.tensor([[4.0, 8.0], [4.0, 8.0]]))
