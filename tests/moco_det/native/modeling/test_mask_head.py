"""The mask branch against hand values, slow loops, and Detectron2's functions where it is."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moco_det.native.modeling import mask_head
from moco_det.native.modeling.boxes import SampledProposals
from moco_det.native.modeling.layers import kernels_of
from moco_det.native.modeling.mask_head import (
    ClassConv,
    MaskRCNNConvUpsampleHead,
    crop_bit_masks,
    crop_polygons,
    mask_targets,
    paste_masks,
)
from moco_det.parity.comparison import fill_outlines


def make_head(**changes) -> MaskRCNNConvUpsampleHead:
    settings = {"num_conv": 2, "dim": 6, "norm": "", "class_agnostic": False}
    torch.manual_seed(0)
    head = MaskRCNNConvUpsampleHead(4, 3, **(settings | changes))
    torch.nn.init.normal_(head.predictor.weight)
    torch.nn.init.normal_(head.predictor.bias)
    return head


def samples_of(boxes, matched, classes=None) -> SampledProposals:
    classes = torch.tensor(classes or [0] * sum(map(len, boxes)), dtype=torch.int64)
    matched = [torch.tensor(index, dtype=torch.int64) for index in matched]
    return SampledProposals(boxes, classes, torch.zeros(len(classes), 4), matched)


def rectangle(x0, y0, x1, y1):
    return np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)


def random_boxes(count, width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand((count, 2), generator=generator) * torch.tensor([width, height]) * 0.7
    side = torch.rand((count, 2), generator=generator) * torch.tensor([width, height]) * 0.3
    return torch.cat([corner, corner + side], dim=1)


def random_polygon(seed, centre=30.0):
    """Star-shaped, with fractional corners."""
    random = np.random.default_rng(seed)
    angle = np.sort(random.uniform(0, 2 * np.pi, 7))
    radius = random.uniform(8, 25, (7, 1))
    return (centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)).reshape(-1)


def test_polygon_target_by_hand():
    """A box of 8 x 4 pixels is drawn on 4 x 4: each of its pixels is 2 wide and 1 high."""
    objects = [
        [rectangle(0, 0, 100, 100)],
        [rectangle(14, 21, 40, 23)],  # from the middle of the box on, its two middle rows
        [rectangle(10, 20, 12, 21), rectangle(16, 23, 18, 24)],  # in two parts
    ]
    boxes = torch.tensor([[10.0, 20.0, 18.0, 24.0]]).repeat(2, 1)
    found = crop_polygons(objects, torch.tensor([1, 2]), boxes, 4)
    assert found.dtype == torch.bool
    assert found[0].int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert found[1].int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def is_inside(x, y, corners):
    """Of a polygon: a ray from the point crosses its sides an odd number of times."""
    crossings = 0
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if (ay > y) != (by > y) and x < ax + (y - ay) / (by - ay) * (bx - ax):
            crossings += 1
    return crossings % 2 == 1


def distance_to(point, corners):
    distances = []
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        t = np.clip(np.dot(point - a, b - a) / np.dot(b - a, b - a), 0, 1)
        distances.append(np.linalg.norm(point - a - t * (b - a)))
    return min(distances)


def test_polygon_targets_equal_a_slow_test_of_each_pixel():
    """But for pixels that a side runs through, which are the COCO API's to decide."""
    side, checked = 14, 0
    for seed, box in enumerate(random_boxes(6, 60, 60, 1) + 5):
        polygon = random_polygon(seed)
        (found,) = crop_polygons([[polygon]], torch.tensor([0]), box[None], side)
        corner, opposite = box.double().split(2)
        corners = (polygon.reshape(-1, 2) - corner.numpy()) * side / (opposite - corner).numpy()
        for row in range(side):
            for column in range(side):
                centre = np.array([column + 0.5, row + 0.5])
                if distance_to(centre, corners) > 0.75:
                    assert found[row, column] == is_inside(*centre, corners)
                    checked += 1
    assert checked > 400


def test_bit_mask_targets_are_majorities():
    """In boxes of whole pixels, each pixel of the target is the vote of k x k of the image's."""
    masks = torch.rand((3, 40, 50), generator=torch.Generator().manual_seed(0)) < 0.5
    boxes = torch.tensor([[4.0, 8, 19, 23], [0.0, 0, 15, 15], [35.0, 25, 50, 40]])
    found = crop_bit_masks(masks, torch.tensor([2, 0, 1]), boxes, 5)
    assert found.dtype == torch.bool
    expected = [masks[2, 8:23, 4:19], masks[0, :15, :15], masks[1, 25:40, 35:50]]
    for target, pixels in zip(found, expected, strict=True):
        votes = pixels.reshape(5, 3, 5, 3).sum(dim=(1, 3))
        assert torch.equal(target, votes >= 5)


def test_bit_mask_on_half_covered_pixels_counts():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :, 1] = True
    box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    assert crop_bit_masks(mask, torch.tensor([0]), box, 2)[0].tolist() == [[True, False]] * 2


def test_targets_are_of_the_matched_object_of_the_region_s_image():
    first = [[rectangle(0, 0, 8, 8)], [rectangle(0, 0, 4, 8)]]
    second = [[rectangle(0, 4, 8, 8)]]
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    samples = samples_of([boxes.repeat(2, 1), boxes[:0], boxes], [[1, 0], [], [0]])
    found = mask_targets([first, [], second], samples, 2).int()
    assert found.tolist() == [[[1, 0], [1, 0]], [[1, 1], [1, 1]], [[0, 0], [1, 1]]]


@pytest.mark.parametrize("masks", [[], torch.zeros(0, 9, 9, dtype=torch.bool)])
def test_images_without_objects_have_no_targets(masks):
    samples = samples_of([torch.zeros(0, 4)], [[]]).on_host()
    assert mask_targets([masks], samples, 7).shape == (0, 7, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_channel_for_each_region_is_the_whole_convolution_s(dtype):
    torch.manual_seed(0)
    conv, channel = ClassConv(5, 4).to(dtype), torch.tensor([3, 0, 3])
    x = torch.randn(3, 5, 2, 6, dtype=dtype)
    found = conv(x, channel)
    expected = F.conv2d(x, conv.weight, conv.bias)[torch.arange(3), channel]
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    gradients = [
        torch.autograd.grad((out * weight).sum(), (conv.weight, conv.bias))
        for out in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_layers():
    head = make_head(norm="BN")
    names = [name for name, _ in head.named_parameters()]
    convs = [f"mask_fcn{k}.{p}" for k in (1, 2) for p in ("weight", "norm.weight", "norm.bias")]
    last = ["deconv.weight", "deconv.bias", "predictor.weight", "predictor.bias"]
    assert names == convs + last
    assert head(torch.randn(5, 4, 7, 7), torch.tensor([0, 1, 2, 0, 1])).shape == (5, 14, 14)
    assert [n for n, _ in make_head(num_conv=0).named_parameters()] == last


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_loss_equals_a_slow_loop(class_agnostic):
    head = make_head(class_agnostic=class_agnostic)
    x, classes = torch.randn(3, 4, 2, 2), [2, 0, 2]
    masks = torch.rand((2, 30, 30), generator=torch.Generator().manual_seed(0)) < 0.5
    samples = samples_of([random_boxes(3, 30, 30, 0)], [[1, 1, 0]], classes)
    targets = mask_targets([masks], samples, 4)

    maps = F.relu(head.deconv(F.relu(head.mask_fcn2(F.relu(head.mask_fcn1(x))))))
    logits = F.conv2d(maps, head.predictor.weight, head.predictor.bias)
    losses = []
    for region in range(3):
        channel = 0 if class_agnostic else classes[region]
        for p, target in zip(
            logits[region, channel].sigmoid().flatten(), targets[region].flatten(), strict=True
        ):
            losses.append(-torch.log(p if target else 1 - p))
    assert len(losses) == 3 * 16
    found = head.losses(x, samples, [masks])
    torch.testing.assert_close(found, {"loss_mask": torch.stack(losses).mean()})
    probabilities = head.predict(x, samples.classes)
    torch.testing.assert_close(probabilities[1], logits[1, 0].sigmoid())


@pytest.mark.parametrize("norm", ["", "BN", "SyncBN"])
def test_without_foreground_the_loss_is_zero_and_has_gradients(norm):
    head = make_head(norm=norm).train()
    nothing = samples_of([torch.zeros(0, 4)], [[]])
    x = torch.zeros(0, 4, 7, 7, requires_grad=True)
    losses = head.losses(x, nothing, [[]])
    assert losses == {"loss_mask": 0}
    losses["loss_mask"].backward()
    assert x.grad is not None
    assert all(p.grad.abs().sum() == 0 for p in head.parameters())
    assert all(value.isfinite().all() for value in head.state_dict().values())


def test_bfloat16_is_close():
    head, x, classes = make_head(), torch.randn(3, 4, 7, 7), torch.tensor([2, 0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        found = head(x, classes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, head(x, classes), rtol=0.1, atol=0.1)


@pytest.fixture(params=["cpu", "cuda"])
def kind(request, monkeypatch):
    """The kernels of each device; those of GPUs in several goes."""
    monkeypatch.setattr(mask_head, "PIXELS_AT_ONCE", 700)
    with kernels_of(request.param):
        yield


@pytest.mark.usefixtures("kind")
def test_paste_by_hand():
    ones = torch.ones(2, 4, 4)
    ones[1, :, 2:] = 0
    boxes = torch.tensor([[2.0, 1.0, 6.0, 5.0], [2.0, 1.0, 6.0, 5.0]])
    found = paste_masks(ones, boxes, (7, 9))
    assert found.dtype == torch.bool
    expected = torch.zeros(2, 7, 9, dtype=torch.bool)
    expected[0, 1:5, 2:6] = True
    expected[1, 1:5, 2:4] = True
    assert torch.equal(found, expected)
    assert paste_masks(ones[:0], boxes[:0], (7, 9)).shape == (0, 7, 9)


def slow_probability(mask, box, x, y):
    """Bilinear between the centres of the mask's pixels, 0 from one pixel beyond them on."""
    side = mask.shape[0]
    u = (x + 0.5 - box[0]) / (box[2] - box[0]) * side - 0.5
    v = (y + 0.5 - box[1]) / (box[3] - box[1]) * side - 0.5
    total = 0.0
    for i in range(side):
        for j in range(side):
            total += mask[i, j] * max(0.0, 1 - abs(u - j)) * max(0.0, 1 - abs(v - i))
    return total


BOXES = torch.tensor(
    [
        [3.2, 2.7, 17.9, 12.1],
        [0.0, 0.0, 20.0, 15.0],  # the image
        [5.6, 3.0, 5.9, 14.0],  # within one column
        [11.5, 1.5, 12.5, 2.5],
        [18.25, 9.0, 20.0, 15.0],  # at the border
    ]
)


@pytest.mark.usefixtures("kind")
def test_paste_equals_a_slow_loop():
    masks = torch.rand((5, 5, 5), generator=torch.Generator().manual_seed(0))
    masks[3] = 1
    found = paste_masks(masks, BOXES, (15, 20))
    for result, mask, box in zip(found, masks.tolist(), BOXES.tolist(), strict=True):
        mask = np.array(mask)
        for y in range(15):
            for x in range(20):
                probability = slow_probability(mask, box, x, y)
                if abs(probability - 0.5) > 1e-5:
                    assert result[y, x] == (probability >= 0.5), (x, y, probability)
    assert 20 < found.sum() < 400


@pytest.mark.usefixtures("kind")
def test_targets_pasted_back_are_the_object():
    """Both ways of making targets and pasting agree on where pixels are, to a fraction of one."""
    polygon = random_polygon(3)
    (bits,) = fill_outlines([[polygon]], (60, 70))
    corners = torch.from_numpy(polygon).float().view(-1, 2)
    box = torch.cat([corners.amin(0), corners.amax(0)])[None]
    zero = torch.tensor([0])
    for targets in (
        crop_polygons([[polygon]], zero, box, 56),
        crop_bit_masks(bits[None], zero, box, 56),
    ):
        (pasted,) = paste_masks(targets.float(), box, (60, 70))
        assert (pasted & bits).sum() > 0.97 * (pasted | bits).sum()
        moved = pasted.roll(1, dims=1)  # by one pixel, the measure tells
        assert (moved & bits).sum() < 0.96 * (moved | bits).sum()


def test_memory_of_pasting_is_that_of_the_result():
    """A grid for each of them at once, as one would sample without a loop, takes eight times it."""
    resource = pytest.importorskip("resource")
    boxes = random_boxes(60, 500, 300, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pasted = paste_masks(torch.rand(60, 28, 28), boxes, (2000, 3000))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert pasted.numel() == 60 * 2000 * 3000
    assert (after - before) * 1024 < 1.25 * pasted.numel()


def test_targets_and_pasting_are_detectron2_s():
    structures = pytest.importorskip("detectron2.structures", reason="compares with Detectron2")
    from detectron2.layers import paste_masks_in_image

    boxes = random_boxes(20, 60, 60, 3) + 3
    boxes[0] = torch.tensor([20.0, 20.0, 20.02, 50.0])  # hardly a box
    objects = [[random_polygon(seed), random_polygon(seed, centre=50.0)] for seed in range(20)]
    matched = torch.arange(20).flip(0)
    of_regions = [objects[index] for index in matched]
    expected = structures.PolygonMasks(of_regions).crop_and_resize(boxes, 28)
    assert torch.equal(crop_polygons(objects, matched, boxes, 28), expected)

    bits = structures.BitMasks.from_polygon_masks(objects, 70, 80).tensor
    expected = structures.BitMasks(bits[matched]).crop_and_resize(boxes, 28)
    assert torch.equal(crop_bit_masks(bits, matched, boxes, 28), expected)
    assert expected.float().mean() > 0.1

    masks = torch.rand((5, 28, 28), generator=torch.Generator().manual_seed(0))
    expected = paste_masks_in_image(masks, BOXES, (15, 20))
    assert torch.equal(paste_masks(masks, BOXES, (15, 20)), expected)
