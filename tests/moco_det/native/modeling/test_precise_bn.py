"""Precise BN against the statistics of all values at once, in one process and in two."""

import copy

import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn

from moco_det.common import processes as comm
from moco_det.common.launch import launch
from moco_det.native.modeling.layers import SyncBatchNorm, precise_bn

SIZES = ((2, 5), (3, 4), (2, 7), (4, 3), (1, 6), (2, 2))  # images and side, per batch


def batches():
    generator = torch.Generator().manual_seed(0)
    return [3 + 2 * torch.randn(n, 3, s, s, generator=generator) for n, s in SIZES]


def make_model(norm=nn.BatchNorm2d):
    torch.manual_seed(1)
    return nn.Sequential(norm(3), nn.Conv2d(3, 4, 1), norm(4)).train()


def first_layer_statistics(inputs):
    """Mean and biased variance per channel of all values of all batches."""
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], dim=1)
    return values.mean(dim=1), values.var(dim=1, correction=0)


def statistics(model):
    return [(m.running_mean, m.running_var) for m in model if hasattr(m, "running_mean")]


def test_one_process_has_the_populations_statistics():
    model = make_model()
    precise_bn(model, iter(batches()), len(SIZES))
    mean, var = first_layer_statistics(batches())
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, var)
    assert model[0].momentum == 0.1
    assert model.training


def test_one_process_agrees_with_fvcore():
    ours, fvcores = make_model(), make_model()
    precise_bn(ours, iter(batches()), len(SIZES))
    update_bn_stats(fvcores, iter(batches()), len(SIZES))
    for (name, a), b in zip(ours.state_dict().items(), fvcores.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_only_as_many_batches_as_asked_for():
    model = make_model()
    precise_bn(model, iter(batches()), 2)
    torch.testing.assert_close(model[0].running_mean, first_layer_statistics(batches()[:2])[0])


def test_layers_in_evaluation_mode_keep_their_statistics():
    model = make_model()
    model[2].eval()
    before = copy.deepcopy(model[2].state_dict())
    precise_bn(model, iter(batches()), len(SIZES))
    assert all(torch.equal(before[k], v) for k, v in model[2].state_dict().items())


NORMS = {"BN": nn.BatchNorm2d, "SyncBN": SyncBatchNorm}


def two_processes(folder):
    for name, norm in NORMS.items():
        model = make_model(norm)
        mine = batches()[comm.rank() :: 2]
        precise_bn(model, iter(mine), len(mine))
        torch.save(statistics(model), f"{folder}/{name}{comm.rank()}.pt")


def test_two_processes_end_with_the_same_statistics_of_all(tmp_path):
    launch(two_processes, num_gpus=2, args=(str(tmp_path),))
    mean, var = first_layer_statistics(batches())
    for name in NORMS:
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, 1))
        for (mean_a, var_a), (mean_b, var_b) in zip(first, second, strict=True):
            assert torch.equal(mean_a, mean_b)
            assert torch.equal(var_a, var_b)
        torch.testing.assert_close(first[0][0], mean)
        torch.testing.assert_close(first[0][1], var)
