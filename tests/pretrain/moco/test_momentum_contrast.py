"""MoCo against slow transcriptions of the paper's formulas."""

import collections
import copy

import numpy as np
import pytest
import torch
from mean_colour import MeanColour, views
from torch import nn
from torch.nn import functional as F

from moco_det.common.errors import UserError
from pretrain.moco.encoders import build_encoder
from pretrain.moco.grouped_batchnorm import GroupedBatchNorm2d, choose_bn_groups, group_batchnorm
from pretrain.moco.instance_discrimination import shuffle_index
from pretrain.moco.momentum_contrast import MoCo


@pytest.mark.usefixtures("float64")
def test_logits_are_those_of_algorithm_1():
    torch.manual_seed(0)
    model = MoCo(MeanColour(), dim=4, queue_size=7, momentum=0.9, temperature=0.2)
    with torch.no_grad():
        model.encoder_k.fc.weight.add_(0.3)  # so that the update is seen
    before = copy.deepcopy(model)
    im_q, im_k = views(5, 1), views(5, 2)
    logits, keys, queries = model(im_q, im_k, shuffle_index(0, 0, 5))

    mean = torch.tensor([123.675, 116.28, 103.53])
    std = torch.tensor([58.395, 57.12, 57.375])
    w_q, b_q = before.encoder_q.fc.weight, before.encoder_q.fc.bias
    w_k = 0.9 * before.encoder_k.fc.weight + 0.1 * w_q
    b_k = 0.9 * before.encoder_k.fc.bias + 0.1 * b_q
    for i in range(5):
        q = w_q @ ((im_q[i].float() - mean) / std).mean(dim=(0, 1)) + b_q
        k = w_k @ ((im_k[i].float() - mean) / std).mean(dim=(0, 1)) + b_k
        q, k = q / q.norm(), k / k.norm()
        row = [q @ k] + [q @ before.queue[:, j] for j in range(7)]
        torch.testing.assert_close(logits[i], torch.stack(row) / 0.2)
        torch.testing.assert_close(queries[i], q)
        torch.testing.assert_close(keys[i], k)


def test_no_gradient_reaches_keys_and_the_queue_stays_as_the_logits_saw_it():
    model = MoCo(MeanColour(), dim=4, queue_size=6)
    queue = model.queue.clone()
    logits, keys, _ = model(views(4, 1), views(4, 2), shuffle_index(0, 0, 4))
    assert torch.equal(model.queue, queue)
    logits.sum().backward()  # would fail had the queue been written in place before
    model.enqueue(keys)
    assert all(p.grad is not None for p in model.encoder_q.parameters())
    assert all(p.grad is None for p in model.encoder_k.parameters())
    assert not keys.requires_grad


@pytest.mark.usefixtures("float64")
def test_key_encoder_starts_as_a_copy_and_follows_by_momentum():
    torch.manual_seed(0)
    model = MoCo(build_encoder("resnet18", 8), 8, queue_size=4, momentum=0.99)
    pairs = list(zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True))
    assert all(torch.equal(q, k) for q, k in pairs)
    with torch.no_grad():
        for q, _ in pairs:
            q.add_(torch.randn_like(q))
    expected = [0.99 * k + 0.01 * q for q, k in pairs]
    model.update_key_encoder()
    for (_, k), wanted in zip(pairs, expected, strict=True):
        torch.testing.assert_close(k, wanted)


def test_without_momentum_the_key_encoder_is_the_query_encoder():
    """m = 0 of Sec. 4.1, whose training fails in the paper: it must be possible to see that."""
    model = MoCo(MeanColour(), dim=4, queue_size=6, momentum=0.0)
    with torch.no_grad():
        model.encoder_q.fc.weight.mul_(1.7)
    model.update_key_encoder()
    assert torch.equal(model.encoder_k.fc.weight, model.encoder_q.fc.weight)


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (10, 4), (7, 5), (5, 5), (3, 8)])
def test_the_queue_is_a_ring_of_any_length(size, batch):
    model = MoCo(MeanColour(), dim=4, queue_size=size)
    ring = collections.deque(model.queue.T.tolist(), maxlen=size)
    for step in range(9):
        keys = F.normalize(torch.randn(batch, 4), dim=1)
        model.enqueue(keys)
        ring.extend(keys.tolist())
        pointer = int(model.queue_ptr)
        assert pointer == (step + 1) * batch % size
        oldest_first = torch.roll(model.queue, -pointer, dims=1).T
        assert torch.equal(oldest_first, torch.tensor(list(ring)))
    torch.testing.assert_close(model.queue.norm(dim=0), torch.ones(size))


@pytest.mark.usefixtures("float64")
def test_the_shuffle_is_undone_exactly():
    model = MoCo(MeanColour(), dim=4, queue_size=4)
    images = views(12)
    direct = model.encode(model.encoder_k, images)
    for step in range(5):
        order = shuffle_index(7, step, 12)
        assert sorted(order.tolist()) == list(range(12))
        torch.testing.assert_close(model.encode_shuffled(model.encoder_k, images, order), direct)


def test_the_shuffle_is_a_function_of_seed_and_step():
    assert torch.equal(shuffle_index(1, 2, 64), shuffle_index(1, 2, 64))
    assert not torch.equal(shuffle_index(1, 2, 64), shuffle_index(1, 3, 64))
    assert not torch.equal(shuffle_index(1, 2, 64), shuffle_index(2, 2, 64))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_batchnorm_is_batchnorm_of_each_group(groups):
    torch.manual_seed(0)
    x = torch.randn(8, 5, 3, 3, requires_grad=True)
    layer = nn.BatchNorm2d(5)
    nn.init.uniform_(layer.weight)
    per_group = [copy.deepcopy(layer) for _ in range(groups)]
    expected = torch.cat([bn(part) for bn, part in zip(per_group, x.chunk(groups), strict=True)])
    weights = torch.randn_like(expected)
    wanted_grad = torch.autograd.grad((expected * weights).sum(), x)[0]

    grouped = group_batchnorm(layer, groups)
    assert isinstance(grouped, GroupedBatchNorm2d)
    out = grouped(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad((out * weights).sum(), x)[0], wanted_grad)
    torch.testing.assert_close(grouped.running_mean, per_group[0].running_mean)
    torch.testing.assert_close(grouped.running_var, per_group[0].running_var)
    assert int(grouped.num_batches_tracked) == 1

    grouped.eval()
    torch.testing.assert_close(grouped(x), per_group[0].eval()(x))


class Level(nn.Module):
    """Encoder whose feature is the image's level after BN: (level, 1), before normalisation."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3, affine=False)

    def forward(self, pixels):
        level = self.bn(pixels).mean(dim=(1, 2, 3))
        return torch.stack([level, torch.ones_like(level)], dim=1)


def leak(shuffled: bool, trials: int = 400) -> float:
    """Correlation of the feature of a black query with that of its own black key.

    Black images all look alike, and a group's BN statistics depend on its white images only. Of 16
    images in 2 groups, 5 are white, 1 to 4 of them in the first group. What the features of black
    images still share is therefore knowledge of the companions, the leak of Sec. 3.3.
    """
    model = MoCo(Level(), dim=2, queue_size=4, bn_groups=2)
    rng = np.random.default_rng(0)
    pairs = []
    for trial in range(trials):
        white = int(rng.integers(1, 5))
        images = torch.zeros(16, 4, 4, 3, dtype=torch.uint8)
        images[:white] = 255
        images[8 : 8 + 5 - white] = 255
        order = shuffle_index(0, trial, 16) if shuffled else torch.arange(16)
        q = model.encode(model.encoder_q, images)
        k = model.encode_shuffled(model.encoder_k, images, order)
        pairs += [(float(q[i, 0]), float(k[i, 0])) for i in (7, 15)]
    return float(np.corrcoef(np.array(pairs).T)[0, 1])


def test_shuffling_hides_a_query_s_companions_from_its_key():
    assert leak(shuffled=False) > 0.99
    assert abs(leak(shuffled=True)) < 0.15  # 800 pairs: three standard errors are 0.11


@pytest.mark.parametrize(
    ("batch", "processes", "groups"),
    [(256, 8, 1), (256, 1, 8), (256, 2, 4), (64, 1, 2), (16, 1, 2), (16, 2, 1), (100, 1, 4)],
)
def test_a_group_holds_32_samples_as_far_as_it_can(batch, processes, groups):
    assert choose_bn_groups(batch, processes) == groups


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((64, 1, 1), "at least two BN groups"),
        ((10, 3), "shared equally by 3"),
        ((64, 1, 5), "64 samples per process cannot be split into 5"),
        ((8, 4, 2), "at least 2 samples each"),
        ((3, 1), "cannot be split into two"),
    ],
)
def test_impossible_groups_are_refused_with_the_reason(arguments, reason):
    with pytest.raises(UserError, match=reason):
        choose_bn_groups(*arguments)


def test_keys_that_are_not_shuffled_need_no_second_group():
    assert choose_bn_groups(64, 1, wanted=1, shuffled=False) == 1
    assert choose_bn_groups(32, 1, shuffled=False) == 1
    assert choose_bn_groups(256, 1, shuffled=False) == 8


def test_state_dict_has_the_official_names():
    model = MoCo(build_encoder("resnet18", 16, mlp=True), 16, queue_size=8, bn_groups=2)
    names = set(model.state_dict())
    assert {"queue", "queue_ptr", "encoder_q.conv1.weight", "encoder_k.fc.2.bias"} <= names
    assert all(n.startswith(("encoder_q.", "encoder_k.", "queue")) for n in names)
    assert model.queue.shape == (16, 8)
    assert model.queue_ptr.shape == (1,)
