"""What a step costs: the arithmetic by hand, and that it is measured at all."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moco_det.benchmark import cost
from moco_det.benchmark.cost import Cost, Setting, hours, measure, ratios, table_rows
from moco_det.common.errors import UserError

TINY = {"arch": "resnet18w0.25x", "image_size": 32}
GIB = 2**30


def test_hours_of_the_paper():
    """5,004 steps an epoch, 200 times; 53 hours of them are 0.19 s each."""
    assert hours(Cost(0, 0.1906), 256) == pytest.approx(53, abs=0.05)
    assert hours(Cost(0, 3.6), 1_281_167) == pytest.approx(0.2)


def test_rows_are_ours_and_then_the_papers():
    costs = {("moco", 512): Cost(3 * GIB, 0.36), ("end-to-end", 512): None}
    assert table_rows(costs) == [
        ["moco", "512", "3.00 GiB", "0.360", "50.0"],
        ["end-to-end", "512", "n/a", "n/a", "n/a"],
        ["paper: moco", "256", "5.0 G", "", "53"],
        ["paper: end-to-end", "256", "7.4 G", "", "65"],
        ["paper: end-to-end", "4096", "93.0 G", "", "n/a"],
    ]


def test_ratios_need_both_mechanisms():
    costs = {("moco", 8): Cost(2, 1.0), ("end-to-end", 8): Cost(3, 1.2), ("moco", 16): Cost(4, 2.0)}
    (line,) = ratios(costs)
    assert line.startswith("end-to-end over moco at batch 8: memory 1.50, time 1.20")
    assert line.endswith("(paper, batch 256: 1.48, 1.23)")
    assert ratios(costs | {("end-to-end", 16): None}) == [line]


@pytest.mark.usefixtures("forked_launches")
def test_a_step_of_two_processes():
    """Through the collectives that several GPUs would use."""
    found = measure(Setting("end-to-end", 8, processes=2, **TINY), steps=1)
    assert 2**27 < found.memory < 2**34  # torch alone takes more than the one
    assert 0 < found.seconds < 600


@pytest.mark.usefixtures("forked_launches")
def test_what_does_not_fit_is_none():
    """Views of 2^57 bytes fit no machine; the allocator says so before anything is touched."""
    assert measure(Setting("moco", 4, arch="resnet18", image_size=2**27), steps=1) is None


def test_memory_errors_are_told_from_others():
    assert cost.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert cost.is_out_of_memory(error.value)
    assert not cost.is_out_of_memory(RuntimeError("shape '[2]' is invalid for input of size 3"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting("moco", 8, device="cuda", processes=99), "needs as many GPUs"),
        (Setting("moco", 9, processes=2), "cannot be shared equally"),
        (Setting("moco", 2), "two or more BN groups"),
    ],
)
def test_impossible_settings(setting, message):
    with pytest.raises(UserError, match=message):
        measure(setting, steps=1)


class Clock:
    """Each second reading is so many seconds after the first."""

    def __init__(self, *seconds):
        self.readings = iter([time for second in seconds for time in (0.0, second)])

    def perf_counter(self):
        return next(self.readings)


@pytest.mark.parametrize(("processes", "batch"), [(1, 8), (2, 16)])
def test_what_is_timed_is_moco_v2_after_two_steps(monkeypatch, processes, batch):
    """The median of the steps after the first two: 2 of 1, 2 and 9."""
    built, inputs = [], []
    build, encoder = cost.build_mechanism, cost.build_encoder

    def mechanism(*args, **options):
        built.append((args[0], options))
        return build(*args, **options)

    def head(*args, **options):
        built.append((args, options))
        return encoder(*args, **options)

    def step(model, loss, optimizer, given, dtype):
        inputs.append((given[0].shape, dtype, model.training))
        assert (optimizer.lr, type(loss).__name__) == (1e-4, "InfoNCE")

    for name, value in (
        ("build_mechanism", mechanism), ("build_encoder", head), ("contrastive_step", step),
        ("world_size", lambda: processes), ("rank", lambda: processes - 1),
        ("time", Clock(100.0, 50.0, 1.0, 9.0, 2.0)),
    ):  # fmt: skip
        monkeypatch.setattr(cost, name, value)
    setting = Setting("moco", batch, processes=processes, amp="bf16", **TINY)
    assert cost._time_steps(setting, 3, torch.device("cpu")) == 2.0
    groups = cost.choose_bn_groups(batch, processes)
    settings = {"samples": 1_281_167, "temperature": 0.2, "bn_groups": groups}
    assert built == [((TINY["arch"],), {"mlp": True}), ("moco", settings)]
    assert inputs == [((8, 32, 32, 3), torch.bfloat16, True)] * 5


def test_processes_see_noise_of_their_own(monkeypatch):
    images = []
    for rank in (0, 1):
        monkeypatch.setattr(cost, "rank", lambda rank=rank: rank)
        images.append(cost._noise(Setting("moco", 4, **TINY), torch.device("cpu")))
    assert not torch.equal(*images)


def test_the_peak_is_in_bytes():
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    kibibytes = int(line.split()[1])
    found = cost.peak_memory_of_process(torch.device("cpu"))
    assert found == pytest.approx(1024 * kibibytes, rel=0.005)


def test_the_costs_are_the_largest_of_all_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "_time_steps", lambda *arguments: 2.0)
    rows = torch.tensor([[10.0, 2.0], [30.0, 1.0], [20.0, 5.0]])
    monkeypatch.setattr(cost, "gather_rows", lambda row: rows)
    cost._run(SimpleNamespace(device="cpu"), 1, tmp_path / "cost")
    assert torch.load(tmp_path / "cost") == [30.0, 5.0]
