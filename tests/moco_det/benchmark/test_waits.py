"""Waits of the host: each kind by hand, and how many a detector's step may have."""

import pytest
import torch

from moco_det.benchmark.speed import DetectorTask, detector_steps
from moco_det.benchmark.waits import count_waits
from moco_det.native.modeling.layers import on_gpu

X = torch.arange(6.0)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda: X.sum().item() + float(X[0]) + int(X[1]), {"item": 3}),
        (lambda: bool(X.sum() > 3), {"item": 1}),
        (lambda: (X > 3).nonzero(), {"nonzero": 1}),
        (lambda: X[X > 3], {"mask index": 1}),
        (lambda: X.clone().__setitem__(X > 3, X[:2]), {"mask index": 1}),
        (lambda: X.clone().__setitem__(X > 3, 1.0), {}),  # everywhere, without the positions
        (lambda: X[torch.tensor([1, 2])], {"upload": 1}),
        (lambda: X.new_tensor([1.0]), {"upload": 1}),
        (lambda: X.where(X > 3, 0), {"upload": 1}),
        (lambda: X.masked_fill(X > 3, 0), {}),
        (lambda: X.tolist(), {"tolist": 1}),
        (lambda: X.cpu().numpy(), {"cpu": 1}),
        (lambda: X.to("cpu"), {"to": 1}),
        (lambda: X.to("cpu", non_blocking=True).to(torch.float64), {}),
        (lambda: X.repeat_interleave(X.long()), {"repeat_interleave": 1}),
        (lambda: X.unique(), {"unique": 1}),
        (lambda: X.topk(2)[0] * 3 + X.cumsum(0)[:2], {}),
    ],
)
def test_what_waits(step, expected):
    assert +count_waits(step) == expected


def test_gradients_count_and_the_gpu_s_kernels_run():
    leaf = X.clone().requires_grad_()

    def step():
        assert on_gpu(leaf)
        leaf[torch.arange(6) > 2].sum().backward()

    # Forward, and backward once more.
    assert +count_waits(step) == {"mask index": 2}
    assert not on_gpu(leaf)


# One for each number of boxes that the host has to know, whatever the batch: sampled anchors, those
# on each level, NMS, proposals, sampled proposals, and for each head the regions on each level and
# those that it is trained on; of masks the places where polygons are drawn.
MOST = {
    "quick/coco_mini_R18_FPN_mask": (9, 9),
    "quick/coco_mini_R18_FPN_keypoint": (9, 10),
    "quick/quickstart_R18_FPN": (6, 8),
    "voc_R50_C4_24k_moco": (7, 10),
    "voc_R50_DC5_24k_moco": (4, 7),
}


@pytest.mark.parametrize("config", MOST)
def test_waits_of_a_detector_do_not_grow_with_the_batch(repository, config):
    path = str(repository / "configs" / f"{config}.yaml")
    opts = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "INPUT.MASK_FORMAT", "polygon")
    opts += ("MODEL.RPN.POST_NMS_TOPK_TRAIN", "40", "MODEL.RPN.POST_NMS_TOPK_TEST", "20")
    if "R50" in config:  # waits do not depend on how wide a network is, but the test's time does
        opts += ("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8")
        opts += ("MODEL.RESNETS.RES2_OUT_CHANNELS", "16")
    for batch_size in (2, 4):
        task = DetectorTask(path, opts, 64, 96, batch_size)
        steps = detector_steps("native", task, task.weights(), ["none"])
        found = tuple(count_waits(steps[p, "none"]).total() for p in ("train", "infer"))
        assert found == MOST[config], batch_size
