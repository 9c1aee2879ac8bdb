"""BN of groups against BN of each group by itself; how many groups a batch is split into."""

import copy

import pytest
import torch
from torch import nn

from moco_det.common.errors import UserError
from pretrain.moco.grouped_batchnorm import GroupedBatchNorm2d, choose_bn_groups, group_batchnorm


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
