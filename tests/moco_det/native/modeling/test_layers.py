"""The norms against torch's own layers; precise BN against the statistics of all values at once."""

import copy

import pytest
import torch
from batch_norms import randomise_norms
from fork_server import run_in_two_processes
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn

from moco_det.common import processes as comm
from moco_det.common.errors import UserError
from moco_det.common.launch import launch
from moco_det.native.modeling.layers import (
    FrozenBatchNorm2d,
    NaiveSyncBatchNorm,
    SyncBatchNorm,
    freeze,
    get_norm,
    precise_bn,
    sync_on_cpu,
)

# -- precise BN -----------------------------------------------------------------------------------

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


NORM_CLASSES = {"BN": nn.BatchNorm2d, "SyncBN": SyncBatchNorm, "naive": NaiveSyncBatchNorm}


def two_processes(folder):
    for name, norm in NORM_CLASSES.items():
        model = make_model(norm)
        mine = batches()[comm.rank() :: 2]
        precise_bn(model, iter(mine), len(mine))
        torch.save(statistics(model), f"{folder}/{name}{comm.rank()}.pt")


@pytest.mark.usefixtures("forked_launches")
def test_two_processes_end_with_the_same_statistics_of_all(tmp_path):
    launch(two_processes, num_gpus=2, args=(str(tmp_path),))
    mean, var = first_layer_statistics(batches())
    for name in NORM_CLASSES:
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, 1))
        for (mean_a, var_a), (mean_b, var_b) in zip(first, second, strict=True):
            assert torch.equal(mean_a, mean_b)
            assert torch.equal(var_a, var_b)
        torch.testing.assert_close(first[0][0], mean)
        torch.testing.assert_close(first[0][1], var)


# -- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs_grad", [False, True])
def test_frozen_batch_norm_is_batch_norm_in_eval_mode(needs_grad):
    torch.manual_seed(0)
    reference = nn.BatchNorm2d(5).eval()
    randomise_norms(reference)
    frozen = FrozenBatchNorm2d.from_batch_norm(reference)
    x = torch.randn(2, 5, 3, 4, requires_grad=needs_grad)
    torch.testing.assert_close(frozen(x), reference(x), rtol=1e-5, atol=1e-6)
    assert list(frozen.parameters()) == []
    fresh = FrozenBatchNorm2d(5)
    torch.testing.assert_close(fresh(x), x, rtol=0, atol=1e-6)
    assert fresh(x.bfloat16()).dtype == torch.bfloat16


def test_unknown_norm():
    assert get_norm("", 4) is None
    with pytest.raises(UserError, match="unknown normalisation 'BatchNorm'.*SyncBN"):
        get_norm("BatchNorm", 4)


@pytest.mark.parametrize("kind", [SyncBatchNorm, NaiveSyncBatchNorm])
def test_sync_batch_norm_alone_is_batch_norm(kind):
    torch.manual_seed(0)
    ours, reference = kind(4), nn.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 6)
    assert torch.equal(ours(x), reference(x))
    assert torch.equal(ours.running_var, reference.running_var)
    assert torch.equal(ours.eval()(x), reference.eval()(x))


def union_batches() -> list[torch.Tensor]:
    """What each process holds: other numbers of rows and of positions, far from mean 0."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(5, 3, 2, 4), (1, 3, 3, 2)]
    return [30 + torch.randn(*s, generator=generator).double() for s in shapes]


def loss_of(y: torch.Tensor, process: int) -> torch.Tensor:
    return (y**3).sum() * (process + 1)


def _sync_batch_norm_process(process: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=2
    )
    layers = nn.Sequential(nn.SyncBatchNorm(3))
    nn.init.constant_(layers[0].weight, 1.5)
    sync_on_cpu(layers)
    norm = layers[0]
    results = {}
    for step in range(2):
        x = (union_batches()[process] + step).float().requires_grad_()
        y = norm(x)
        loss_of(y, process).backward()
        results[step] = (y.detach(), x.grad)
    results["norm"] = [b.clone() for b in norm.buffers()]
    # A process without any region takes part all the same.
    results["empty"] = norm(x.detach()[: 1 - process]).detach()
    before = [b.clone() for b in norm.buffers()]
    norm.zero_grad()
    norm(x.detach()[:0]).sum().backward()  # and where no process has one, nothing is learnt
    results["nothing learnt"] = all(map(torch.equal, before, norm.buffers()))
    results["gradients"] = [p.grad for p in norm.parameters()]
    torch.save(results, f"{folder}/{process}.pt")
    torch.distributed.destroy_process_group()


def naive_batches(step: int) -> list[torch.Tensor]:
    """What each process holds: images of different number and size, with different statistics."""
    generator = torch.Generator().manual_seed(5 + step)
    shapes = [(5, 3, 2, 4), (1, 3, 3, 2)]
    pairs = [(1 + p) * (p + torch.randn(*s, generator=generator)) for p, s in enumerate(shapes)]
    return [x.double() for x in pairs]


def _naive_sync_batch_norm_process(process: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=2
    )
    norm = get_norm("naiveSyncBN", 3)
    nn.init.constant_(norm.weight, 1.5)
    results = {}
    for step in range(2):
        x = naive_batches(step)[process].float().requires_grad_()
        y = norm(x)
        loss_of(y, process).backward()
        results[step] = (y.detach(), x.grad)
    results["weight"] = norm.weight.grad
    results["norm"] = [norm.running_mean.clone(), norm.running_var.clone()]
    # A process without any value is left out: the other's statistics are those of both.
    norm.zero_grad()
    results["one"] = norm(naive_batches(2)[process].float()[: 1 - process])
    results["one"].sum().backward()
    before = [norm.running_mean.clone(), norm.running_var.clone()]
    norm(x.detach()[:0]).sum().backward()  # and where no process has one, nothing is learnt
    after = [norm.running_mean, norm.running_var]
    results["nothing learnt"] = all(map(torch.equal, before, after))
    results["half"] = norm(x.detach().bfloat16()).dtype
    results["evaluated"] = norm.eval()(x.detach())
    torch.save(results, f"{folder}/{process}.pt")
    torch.distributed.destroy_process_group()


def test_naive_sync_batch_norm_weighs_the_processes_alike(tmp_path):
    """Against the formula: the mean of the processes' means, and of their mean squares."""
    run_in_two_processes(_naive_sync_batch_norm_process, str(tmp_path))
    processes = [torch.load(tmp_path / f"{p}.pt") for p in (0, 1)]

    def channels(v):
        return v.reshape(1, 3, 1, 1)

    running_mean, running_var = torch.zeros(3).double(), torch.ones(3).double()
    weights = [torch.full((3,), 1.5).double().requires_grad_() for _ in (0, 1)]
    for step in range(2):
        xs = [x.requires_grad_() for x in naive_batches(step)]
        mean = sum(x.mean(dim=(0, 2, 3)) for x in xs) / 2
        var = sum((x**2).mean(dim=(0, 2, 3)) for x in xs) / 2 - mean**2
        running_mean = 0.9 * running_mean + 0.1 * mean.detach()
        running_var = 0.9 * running_var + 0.1 * var.detach()
        deviation = channels((var + 1e-5).sqrt())
        ys = [channels(weights[p]) * (x - channels(mean)) / deviation for p, x in enumerate(xs)]
        sum(loss_of(y, p) for p, y in enumerate(ys)).backward()
        for p, (x, y) in enumerate(zip(xs, ys, strict=True)):
            torch.testing.assert_close(processes[p][step][0].double(), y, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(processes[p][step][1].double(), x.grad, rtol=1e-4, atol=1e-4)
    union = torch.cat([x.detach().transpose(0, 1).flatten(1) for x in xs], dim=1)
    assert (mean.detach() - union.mean(dim=1)).abs().min() > 0.1  # SyncBN would differ
    for p, result in enumerate(processes):
        torch.testing.assert_close(result["norm"][0].double(), running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["norm"][1].double(), running_var, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result["weight"].double(), weights[p].grad, rtol=1e-4, atol=1e-3)
        assert result["nothing learnt"]
        assert result["half"] == torch.bfloat16
    alone = nn.BatchNorm2d(3)
    nn.init.constant_(alone.weight, 1.5)
    expected = alone(naive_batches(2)[0].float()[:1])
    torch.testing.assert_close(processes[0]["one"], expected, rtol=1e-4, atol=1e-4)
    assert processes[1]["one"].shape == (0, 3, 3, 2)


def test_naive_sync_batch_norm_is_frozen_like_any_other():
    layers = nn.Sequential(NaiveSyncBatchNorm(3))
    freeze(layers)
    assert isinstance(layers[0], FrozenBatchNorm2d)


def test_sync_batch_norm_of_two_processes_is_batch_norm_over_the_union(tmp_path):
    run_in_two_processes(_sync_batch_norm_process, str(tmp_path))
    processes = [torch.load(tmp_path / f"{p}.pt") for p in (0, 1)]

    reference = nn.BatchNorm1d(3).double()
    nn.init.constant_(reference.weight, 1.5)
    for step in range(2):
        xs = [(x + step).requires_grad_() for x in union_batches()]
        rows = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, 3) for x in xs])
        outputs = reference(rows).split([x.numel() // 3 for x in xs])
        sum(loss_of(y, p) for p, y in enumerate(outputs)).backward()
        for p, (x, y) in enumerate(zip(xs, outputs, strict=True)):
            y = y.view(x.shape[0], *x.shape[2:], 3).permute(0, 3, 1, 2)
            torch.testing.assert_close(processes[p][step][0].double(), y, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(processes[p][step][1].double(), x.grad, rtol=1e-4, atol=1e-4)
    for result in processes:
        assert result["nothing learnt"]
        assert [g.abs().sum() for g in result["gradients"]] == [0, 0]
        mean, var, steps = result["norm"]
        torch.testing.assert_close(mean.double(), reference.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(var.double(), reference.running_var, rtol=1e-4, atol=1e-4)
        assert steps == 2
    assert processes[0]["empty"].shape == (1, 3, 2, 4)
    assert processes[0]["empty"].isfinite().all()
    assert processes[1]["empty"].shape == (0, 3, 3, 2)
