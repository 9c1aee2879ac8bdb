"""Every flag of a classifier's training arrives where it works: each is given its own value."""

import pytest
import torch

from pretrain.data.labelled import find_splits
from pretrain.evaluation.classification import FeatureBatches, FineTuning, LinearProbe
from pretrain.evaluation.features import SplitFeatures
from pretrain.flags.evaluation import parse_linear
from pretrain.flags.launch import loading
from pretrain.linear import build_encoder, build_task

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FLAGS = ["-a", "resnet18w0.25x", "-b", "10", "-j", "0", "--pretrained", "random"]


@pytest.fixture
def task_of(images):
    """Function: flags -> the task that they ask for."""

    def make(*flags):
        args = parse_linear([str(images), *FLAGS, "--image-size", "32", *flags])
        classes, train, val = find_splits(images)
        batching = loading(args, CPU, seed=3)
        features = SplitFeatures(val, args.image_size, batching, CPU, None)
        encoder = build_encoder(args, len(classes), None)
        return build_task(args, encoder, classes, train, features, batching)

    return make


@pytest.mark.parametrize(
    ("mode", "kind", "defaults", "milestones"),
    [
        ((), LinearProbe, (30.0, 0.0), (60, 80)),
        (("--finetune",), FineTuning, (0.03, 1e-4), (70, 90)),
    ],
)
def test_the_defaults_of_the_protocols(task_of, mode, kind, defaults, milestones):
    """Those of the official linear classification, and of fine-tuning (v1, Sec. 4.2)."""
    task = task_of(*mode)
    assert type(task) is kind
    (group,) = task.optimizer.sgd.param_groups
    assert (group["lr"], group["weight_decay"]) == defaults
    assert group["momentum"] == 0.9
    trained = task.model.fc if kind is LinearProbe else task.model
    assert [id(p) for p in group["params"]] == [id(p) for p in trained.parameters()]
    schedule = task.optimizer.schedule
    for number, milestone in enumerate(milestones):
        assert schedule(milestone - 1, 0) == pytest.approx(0.1**number)
        assert schedule(milestone, 0) == pytest.approx(0.1 ** (number + 1))


@pytest.mark.parametrize("mode", [(), ("--finetune",)])
def test_the_flags_of_the_optimizer(task_of, mode):
    flags = ("--lr", "0.7", "--momentum", "0.6", "--wd", "0.003", "--schedule", "3")
    task = task_of(*mode, *flags, "--eval-every", "4")
    (group,) = task.optimizer.sgd.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.7, 0.6, 0.003)
    assert [task.optimizer.schedule(epoch, 0) for epoch in (2, 3)] == [1, 0.1]
    assert task.eval_every == 4


def test_the_flags_of_fine_tuning(task_of):
    task = task_of("--finetune", "--bn-groups", "5")
    assert (task.bn_groups, task.model.bn1.groups) == (5, 5)
    assert all(parameter.requires_grad for parameter in task.model.parameters())
    assert task.model.training
    scaled = {
        amp: task_of("--finetune", "--amp", amp).optimizer.scaler.is_enabled()
        for amp in ("none", "bf16", "fp16")
    }
    assert scaled == {"none": False, "bf16": False, "fp16": True}


def test_the_flags_of_the_linear_protocol(task_of):
    task = task_of("--amp", "fp16")
    assert not task.optimizer.scaler.is_enabled()
    assert {n for n, p in task.model.named_parameters() if p.requires_grad} == {
        "fc.weight",
        "fc.bias",
    }
    assert not task.model.training
    cached = task_of("--cache-features")
    assert isinstance(cached.batches, FeatureBatches)
    assert cached.backbone is None
    assert (cached.batches.sampler.batch_size, cached.batches.sampler.seed) == (10, 3)


def test_the_flags_of_the_images(task_of):
    task = task_of("--max-unreadable", "0.3", "--image-size", "40")
    assert task.batches.unreadable.tolerated == 0.3
    assert (task.batches.crops.image_size, task.batches.crops.seed) == (40, 3)
    assert task.batches.crops[0, 0][0].shape == (40, 40, 3)
    small = task_of("--finetune", "--small-stem").model
    assert small.conv1.kernel_size == (3, 3)
