"""BN of groups against BN of each group by itself; how many groups a batch is split into."""

import copy

import pytest
import torch
from devices import DEVICES
from timm.layers import BatchNormAct2d
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


KINDS = {
    "of rows": (lambda: nn.BatchNorm1d(5), (8, 5)),
    "of sequences": (lambda: nn.BatchNorm1d(5), (8, 5, 7)),
    "of volumes": (lambda: nn.BatchNorm3d(5), (8, 5, 2, 3, 3)),
    "with an activation": (lambda: BatchNormAct2d(5), (8, 5, 3, 3)),
    "without running statistics": (
        lambda: nn.BatchNorm2d(5, track_running_stats=False),
        (8, 5, 3, 3),
    ),
    "of a cumulative average": (lambda: nn.BatchNorm2d(5, momentum=None), (8, 5, 3, 3)),
    "without scale and shift": (lambda: nn.BatchNorm2d(5, affine=False), (8, 5, 3, 3)),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_batchnorm_do_so_too(kind):
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    layer = make()
    per_group = [copy.deepcopy(layer) for _ in range(4)]
    grouped = group_batchnorm(nn.Sequential(layer), 4)
    names = list(grouped.state_dict())
    assert group_batchnorm(grouped, 2) is group_batchnorm(grouped, 4)  # may be changed again
    for _ in range(2):
        x = torch.randn(shape) * 3 + 1
        parts = zip(per_group, x.chunk(4), strict=True)
        torch.testing.assert_close(grouped(x), torch.cat([bn(part) for bn, part in parts]))
    expected = per_group[0].state_dict()
    assert names == [f"0.{name}" for name in expected]
    for name, value in expected.items():
        torch.testing.assert_close(grouped.state_dict()[f"0.{name}"], value)
    torch.testing.assert_close(grouped.eval()(x), per_group[0].eval()(x))
    if kind == "of rows":
        with pytest.raises(UserError, match="GroupedBatchNorm1d gets 6 rows.* 4 BN groups"):
            grouped.train()(x[:6])


IN_TURN, AT_ONCE = GroupedBatchNorm2d.in_turn, GroupedBatchNorm2d.at_once


def results(x, groups, way):
    """(out, gradients of x, weight and bias, the layer), by `way`: layer, x -> out."""
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(x.shape[1])
    nn.init.uniform_(layer.weight)
    nn.init.uniform_(layer.bias)
    weights = torch.empty_like(x).copy_(torch.randn(x.shape))  # in x's memory format
    layer = group_batchnorm(layer, groups).to(x.device, torch.promote_types(x.dtype, torch.float32))
    x = x.detach().requires_grad_()
    out = way(layer, x)
    loss = (out * weights).sum()
    gradients = torch.autograd.grad(loss, [x, layer.weight, layer.bias])
    return out.detach(), *gradients, layer


def assert_same(found, expected, tolerance, of_statistics):
    """Tolerances are of a tensor's largest value."""
    *tensors, layer = found
    *wanted, reference = expected
    for tensor, other in zip(tensors, wanted, strict=True):
        tensor = tensor.to(other)
        torch.testing.assert_close(tensor, other, rtol=0, atol=tolerance * float(other.abs().max()))
    for tensor, other in zip(layer.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(tensor.to(other), other, rtol=of_statistics, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_at_once_are_groups_in_turn(groups, memory_format):
    torch.manual_seed(0)
    x = torch.randn(8, 5, 3, 7, dtype=torch.float64) * 2 + torch.arange(1, 6).view(5, 1, 1)
    x = x.to(memory_format=memory_format)
    found = results(x, groups, AT_ONCE)
    assert_same(found, results(x, groups, IN_TURN), 1e-13, 1e-13)
    out, gradient, *_ = found
    assert out.stride() == gradient.stride() == x.stride()  # nothing is copied into another order


def test_groups_at_once_keep_their_digits_where_the_mean_is_far_from_zero():
    """A sum of squares around 0 would have none of the variance left in float32."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16) + 3000.0
    assert_same(results(x, 2, AT_ONCE), results(x.double(), 2, IN_TURN), 1e-3, 1e-5)


def test_a_channel_that_is_constant_in_a_group_becomes_its_bias():
    x = torch.full((4, 2, 3, 3), 1e4)
    out, gradient, *_, layer = results(x, 2, AT_ONCE)
    torch.testing.assert_close(out, layer.bias.detach().view(2, 1, 1).expand_as(out))
    assert gradient.isfinite().all()


def compiled(backend):
    """A layer as a ResNet's compiled code has it: a ReLU behind it, in place."""
    torch._dynamo.reset()
    return torch.compile(lambda layer, x: layer(x).relu_(), fullgraph=True, backend=backend)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 3e-3)]
)
@pytest.mark.parametrize("groups", [1, 4])
def test_compiled_layers_take_all_groups_at_once(groups, dtype, tolerance, device, monkeypatch):
    """On a GPU by kernels that the compiler writes, on a CPU by PyTorch's."""
    torch.manual_seed(0)
    x = (torch.randn(8, 5, 6, 6) * 2 + 1).to(device, dtype, memory_format=torch.channels_last)
    exact = results(x.double().cpu(), groups, lambda layer, x: IN_TURN(layer, x).relu_())
    monkeypatch.delattr(GroupedBatchNorm2d, "in_turn")
    found = results(x, groups, compiled("inductor" if device == "cuda" else "aot_eager"))
    assert found[0].dtype == dtype
    assert_same(found, exact, tolerance, 1e-3)


@pytest.mark.slow
def test_the_compiler_of_cpus_gives_the_same_numbers():
    torch.manual_seed(0)
    x = (torch.randn(8, 4, 6, 6) * 2 + 1).to(memory_format=torch.channels_last)
    exact = results(x.double(), 4, lambda layer, x: IN_TURN(layer, x).relu_())
    found = results(x, 4, compiled("inductor"))
    assert_same(found, exact, 1e-5, 1e-5)
    assert found[0].stride() == found[1].stride() == x.stride()


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
