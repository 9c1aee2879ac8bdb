"""The benchmark of a pretraining step does the work that it times; how long it takes is no test."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from moco_det.benchmark import pretrain_step
from moco_det.benchmark.pretrain_step import (
    Candidate,
    PlainMoCo,
    Setting,
    Timing,
    best_official,
    candidates,
    table_rows,
    time_steps,
)
from moco_det.common.errors import UserError
from pretrain.moco.momentum_contrast import MoCo

TINY = Setting("resnet18w0.25x", batch_size=8, image_size=32, device="cpu")


def test_each_value_has_a_row_beside_the_last_of_the_others():
    forms = candidates(
        dataclasses.replace(TINY, batch_size=256), ["none", "fp16", "bf16"], [1, 8],
        ["off", "graphs", "on"], deterministic=True,
    )  # fmt: skip
    assert [str(form) for form in forms] == [
        "official, fp32",
        "official, fp32, channels_last",
        "official, fp32, channels_last, compiled",
        "official, bf16",
        "official, bf16, channels_last",
        "official, bf16, channels_last, compiled",
        "ours, fp32, 8 BN groups, compiled",
        "ours, fp16, 8 BN groups, compiled",
        "ours, bf16, 8 BN groups, compiled",
        "ours, bf16, 1 BN group, compiled",
        "ours, bf16, 8 BN groups",
        "ours, bf16, 8 BN groups, compiled, CUDA graphs",
        "ours, bf16, 8 BN groups, deterministic",
    ]
    (_, _, ours) = candidates(TINY, ["none"], [], ["off"], False)
    assert ours == Candidate(True, bn_groups=2)  # main.py's own number
    with pytest.raises(UserError, match="8 samples per process cannot be split into 3"):
        candidates(TINY, ["none"], [3], ["off"], False)


def test_a_table_compares_with_the_published_and_with_the_best_form():
    forms = [Candidate(False, channels_last=False), Candidate(False), Candidate(True, bn_groups=2)]
    measured = Timing(0.4, 2**30), Timing(0.2, 2**30), Timing(0.1, 2**31)
    timings = dict(zip(forms, measured, strict=True))
    assert best_official(timings) == forms[1]
    assert table_rows(TINY, timings) == [
        ["official, fp32", "400.0", "20.0", "1.00", "0.50", "1.00 GiB"],
        ["official, fp32, channels_last", "200.0", "40.0", "2.00", "1.00", "1.00 GiB"],
        ["ours, fp32, 2 BN groups", "100.0", "80.0", "4.00", "2.00", "2.00 GiB"],
    ]


@pytest.mark.usefixtures("forked_launches")
def test_all_forms_take_their_steps(monkeypatch):
    asked = []
    monkeypatch.setattr(MoCo, "compile_encoders", lambda self, **given: asked.append(given))
    forms = candidates(TINY, ["none", "bf16"], [1, 2], ["off", "graphs"], deterministic=True)
    measured = [*forms[:2], forms[-3], forms[-1]]  # the others differ by what these have
    monkeypatch.setattr(pretrain_step, "_memory_of_process", lambda setting, form: 2**28)
    timings = time_steps(TINY, measured, rounds=1)
    assert list(timings) == measured
    assert all(timing.seconds > 0 for timing in timings.values())
    assert asked == [{"cuda_graphs": True}]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("forked_launches")
def test_memory_is_that_of_a_process_of_its_own():
    assert 2**27 < pretrain_step._memory_of_process(TINY, Candidate(True, bn_groups=2)) < 2**34


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_the_reference_is_algorithm_1(amp, channels_last):
    """Its logits are ours, of the same weights with the same shuffle."""
    with pretrain_step._one_process(gpu=False):
        torch.manual_seed(0)
        model = PlainMoCo("resnet18w0.25x", 16, queue_size=16)
        x_q, x_k = torch.randn(2, 8, 3, 32, 32)
        queue = model.queue.clone()
        with torch.no_grad():
            q = F.normalize(model.f_q(x_q), dim=1)
            k = F.normalize(model.f_k(x_k), dim=1)
        wanted = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], dim=1) / 0.2
        wanted = F.cross_entropy(wanted, torch.zeros(8, dtype=torch.long))
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        before = model.f_q.conv1.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        dtype = pretrain_step.AMP_DTYPES[amp]
        found = model.step(optimizer, x_q, x_k, dtype)
    of_loss, of_keys = {"none": (1e-4, 1e-4), "bf16": (0.02, 0.1)}[amp]
    assert found == pytest.approx(float(wanted), rel=of_loss)
    assert not torch.equal(model.f_q.conv1.weight, before)
    torch.testing.assert_close(model.queue[:, :8].T, k, rtol=0, atol=of_keys)
    assert torch.equal(model.queue[:, 8:], queue[:, 8:])


@pytest.fixture
def alone(monkeypatch):
    """Collectives of one process."""
    monkeypatch.setattr(pretrain_step, "_all_gather", lambda tensor: tensor)
    monkeypatch.setattr(pretrain_step.dist, "broadcast", lambda tensor, source: None)
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n, device=device).roll(1))


@pytest.mark.usefixtures("alone")
def test_the_plain_program_is_algorithm_1():
    """One step by hand, in evaluation mode, where shuffling changes nothing."""
    torch.manual_seed(0)
    model = PlainMoCo("resnet18w0.25x", dim=4, queue_size=12, m=0.9, tau=0.5).eval()
    for p_q, p_k in zip(model.f_q.parameters(), model.f_k.parameters(), strict=True):
        assert torch.equal(p_q, p_k)
        p_k.data += 0.01
    before, queue = copy.deepcopy(model), model.queue.clone()
    x_q, x_k = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.SGD(model.f_q.parameters(), lr=0.0)
    loss = model.step(optimizer, x_q, x_k)
    followed = copy.deepcopy(before.f_k)
    own, theirs = before.f_q.parameters(), before.f_k.parameters()
    for target, p_q, p_k in zip(followed.parameters(), own, theirs, strict=True):
        target.data = 0.9 * p_k.data + 0.1 * p_q.data
    for found, wanted in zip(model.f_k.parameters(), followed.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        q, k = (f(x) for f, x in ((before.f_q, x_q), (followed, x_k)))
        q, k = (x / x.norm(dim=1, keepdim=True) for x in (q, k))
    pairs = zip(q, k, strict=True)
    terms = [torch.exp(torch.cat([(a * b).sum()[None], a @ queue]) / 0.5) for a, b in pairs]
    expected = sum(-torch.log(t[0] / t.sum()) for t in terms) / 4
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(model.queue[:, :4], k.T)
    assert torch.equal(model.queue[:, 4:], queue[:, 4:])
    assert model.position == 4
    for _ in range(2):
        model.step(optimizer, x_q, x_k)
    assert model.position == 0
