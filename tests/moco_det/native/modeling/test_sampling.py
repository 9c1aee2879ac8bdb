"""The regions that the heads are trained on, against hand values."""

import pytest
import torch
from torchvision.ops import box_iou

from moco_det.native.modeling.sampling import RegionSampler, RegionSamples, Targets


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
    samples = RegionSamples(
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
