"""A step of a classifier, its validations and what it saves, each by hand."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pretrain.engine.checkpoints import Checkpoint
from pretrain.engine.optimization import ScheduledSGD
from pretrain.evaluation.classification import (
    BEST,
    FeatureBatches,
    FineTuning,
    LinearProbe,
    evaluate,
)


class Colours(nn.Module):
    """The smallest encoder: a norm and the mean colour below its classifier."""

    def __init__(self, classes: int = 7):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        return self.fc(self.avgpool(self.bn(x)).flatten(1))


ABOUT = {"classes": list("abcdefg"), "data": {"images": 4}}


def make_probe(val=None, backbone=None, eval_every=1, lr=0.5):
    torch.manual_seed(0)
    model = Colours().eval().requires_grad_(False)
    optimizer = ScheduledSGD(model.fc, lr, 0.0, 0.0)
    return LinearProbe(model, optimizer, None, None, eval_every, val, backbone, **ABOUT)


def make_fine_tuning(val=None, dtype=None):
    torch.manual_seed(0)
    model = Colours().eval().requires_grad_(False)
    optimizer = ScheduledSGD(model, 0.5, 0.0, 0.0)
    return FineTuning(model, optimizer, None, dtype, 1, val, 1, **ABOUT)


def test_a_step_is_of_the_mean_over_the_batch_with_nothing_of_the_unreadable():
    """An unreadable image has label -1: no loss and no hit, but one of the batch."""
    task = make_probe()
    features, labels = torch.randn(5, 3), torch.tensor([2, -1, 0, 6, -1])
    weight = task.model.fc.weight.detach().clone().requires_grad_(True)
    logits = features @ weight.T + task.model.fc.bias.detach()
    readable = [
        (row, label) for row, label in zip(logits, labels.tolist(), strict=True) if label >= 0
    ]
    loss = sum(torch.logsumexp(row, 0) - row[label] for row, label in readable) / 5
    (gradient,) = torch.autograd.grad(loss, weight)
    ranks = [int((row > row[label]).sum()) for row, label in readable]
    found = task.step((features, labels), 0)
    expected = [loss.item(), *(100 * sum(rank < k for rank in ranks) / 5 for k in (1, 5))]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(task.model.fc.weight.detach(), weight.detach() - 0.5 * gradient)
    assert not task.model.bn.training
    assert task.model.fc.weight.requires_grad


def test_a_probe_sees_images_through_its_backbone():
    images = torch.randint(0, 256, (4, 6, 6, 3), dtype=torch.uint8)
    seen = []

    def backbone(pixels):
        seen.append((pixels.shape, torch.is_grad_enabled()))
        return pixels.mean(dim=(2, 3))

    task = make_probe(backbone=backbone)
    logits = task.logits(images)
    assert seen == [((4, 3, 6, 6), False)]
    pixels = (images.float() - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor(
        [58.395, 57.12, 57.375]
    )
    torch.testing.assert_close(logits, task.model.fc(pixels.mean(dim=(1, 2))))


def test_fine_tuning_trains_in_training_mode_and_validates_in_evaluation_mode():
    modes = []

    def compute(backbone):
        modes.extend(m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
        return torch.randn(4, 3), torch.tensor([0, 1, 2, 3])

    task = make_fine_tuning(SimpleNamespace(compute=compute))
    assert all(m.training for m in task.model.modules())
    assert all(p.requires_grad for p in task.model.parameters())
    before = task.model.bn.running_mean.clone()
    task.step((torch.randint(0, 256, (4, 6, 6, 3), dtype=torch.uint8), torch.arange(4)), 0)
    assert not torch.equal(task.model.bn.running_mean, before)
    task.validation()
    assert modes == [False]
    assert all(m.training for m in task.model.modules())


def test_fine_tuning_runs_in_mixed_precision_where_asked():
    for dtype in (None, torch.bfloat16):
        task, seen = make_fine_tuning(dtype=dtype), []
        task.model.fc.register_forward_hook(lambda layer, x, y, seen=seen: seen.append(y.dtype))
        logits = task.logits(torch.zeros(4, 6, 6, 3, dtype=torch.uint8))
        assert (seen, logits.dtype) == ([dtype or torch.float32], torch.float32)


def test_metrics_are_means_over_all_of_val():
    """2500 images: more than are looked at at once, and no whole number of such parts."""
    torch.manual_seed(0)
    fc, features, labels = nn.Linear(3, 7), torch.randn(2500, 3), torch.randint(7, (2500,))
    with torch.no_grad():
        logits = fc(features).double()
    own = logits.gather(1, labels[:, None])
    ranks = (logits > own).sum(dim=1)
    expected = {
        "val_loss": (logits.logsumexp(1) - own[:, 0]).mean().item(),
        "val_acc1": 100 * (ranks < 1).double().mean().item(),
        "val_acc5": 100 * (ranks < 5).double().mean().item(),
    }
    assert evaluate(fc, features, labels) == pytest.approx(expected, rel=1e-5)


class Run:
    """What a task asks of its trainer; notes what is recorded and saved."""

    epochs = 5

    def __init__(self):
        self.seen = []

    def timed(self, stage):
        return contextlib.nullcontext()

    def record(self, values, line):
        self.seen.append((values["epoch"], round(values["val_acc1"])))

    def save(self, name="last"):
        self.seen.append(name)


def test_validations_and_the_best_are_saved(monkeypatch):
    accuracies = iter([50.0, 40.0, 50.0])
    monkeypatch.setattr(
        "pretrain.evaluation.classification.evaluate",
        lambda fc, features, labels: {
            "val_loss": 1.0, "val_acc1": next(accuracies), "val_acc5": 90.0,
        },
    )  # fmt: skip
    task, run = make_probe(val=(None, None), eval_every=2), Run()
    run.epoch = 1
    assert task.to_come(run) == {"validation": 3, "checkpoint": 3}
    for number in range(1, 6):
        task.after_epoch(run, number)
    assert run.seen == [(2, 50), BEST, "last", (4, 40), "last", (5, 50), "last"]
    assert task.state() == {"best_acc1": 50.0, **ABOUT}
    resumed = make_probe()
    resumed.load_state(Checkpoint("path", {"best_acc1": 50.0, "data": ABOUT["data"]}))
    assert resumed.best == 50.0


def test_cached_features_come_in_the_order_of_their_epoch():
    features, labels = torch.arange(24.0).view(12, 2), torch.arange(12)
    batches = FeatureBatches(features, labels, SimpleNamespace(batch_size=5, seed=3))
    assert (batches.samples, batches.steps_per_epoch) == (12, 2)
    orders = []
    for epoch in (0, 1, 0):
        batches.start(epoch, 0)
        found = list(batches)
        for some, targets in found:
            assert torch.equal(some, features[targets])
        orders.append(torch.cat([targets for _, targets in found]).tolist())
    assert [len(order) for order in orders] == [10] * 3
    assert orders[0] == orders[2] != orders[1]
    assert len(set(orders[0])) == 10
    batches.start(0, 1)
    ((_, second),) = list(batches)
    assert second.tolist() == orders[0][5:]
