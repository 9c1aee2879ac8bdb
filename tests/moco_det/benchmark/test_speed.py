"""The detector benchmark does the work it times; how long that takes is no test."""

import pytest
import torch

from moco_det.benchmark import speed
from moco_det.benchmark.speed import (
    DetectorTask,
    DetectorTimes,
    alternate,
    compare_detectors,
    detector_memory,
    detector_steps,
)
from moco_det.engines import probe_class


@pytest.fixture
def task(repository):
    config = str(repository / "configs" / "quick" / "quickstart_R18_FPN.yaml")
    return DetectorTask(config, ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""), 64, 96, batch_size=2)


def test_steps_train_and_infer_with_the_weights_given(task, monkeypatch):
    probes = []
    build = probe_class("native").__init__
    monkeypatch.setattr(
        probe_class("native"),
        "__init__",
        lambda self, *args: probes.append(self) or build(self, *args),
    )
    weights = task.weights()
    steps = detector_steps("native", task, weights, ["none", "bf16"])
    assert set(steps) == {(p, amp) for p in ("train", "infer") for amp in ("none", "bf16")}
    model = probes[-1].model
    for (phase, _), step in steps.items():
        found = step()
        assert model.training == (phase == "train")
        if phase == "infer":
            assert [len(image["boxes"]) > 0 for image in found] == [True, True]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name  # so that the work stays the same


@pytest.mark.usefixtures("forked_launches")
def test_memory_of_a_process_of_its_own(task):
    peak = detector_memory("native", task, task.weights(), "none")
    assert 2**27 < peak < 2**34  # torch alone takes more than the one, nothing here the other


# -- clocks ---------------------------------------------------------------------------------------


def test_candidates_take_turns_after_a_round_that_is_not_timed():
    """Seconds of each turn, by hand; what runs on a device is waited for within its turn."""
    now, calls = [0.0], []
    lengths = iter([100.0, 90.0, 1.0, 10.0, 5.0, 30.0, 2.0, 20.0])

    def candidate(name):
        def run():
            calls.append(name)
            now[0] += next(lengths)

        return run

    def synchronize():
        calls.append("wait")
        now[0] += 0.25

    candidates = {"a": candidate("a"), "b": candidate("b")}
    found = alternate(candidates, 3, synchronize, clock=lambda: now[0])
    assert found == {"a": 2.25, "b": 20.25}
    assert calls == ["a", "wait", "b", "wait"] * 4


def test_two_engines_side_by_side(task, monkeypatch):
    monkeypatch.setattr(speed, "detector_memory", lambda engine, task, weights, amp: 2**30)
    train, infer = compare_detectors(("native", "native"), task, ["none"], rounds=1)
    assert (train.phase, infer.phase) == ("train", "infer")
    assert train.memory == (2**30, 2**30)
    assert infer.memory is None
    assert 0 < train.waits[0] == train.waits[1] < 20
    assert all(0 < seconds < 60 for row in (train, infer) for seconds in row.seconds)


def test_cells_of_a_row():
    row = DetectorTimes(16, "train", "bf16", (0.2, 0.15), (2**31, 2**30), (None, 9))
    expected = ["16", "train", "bf16", "200.0", "150.0", "0.75", "2.00", "1.00", "0.50", "", "9"]
    assert row.cells() == expected
    infer = DetectorTimes(2, "infer", "none", (0.1, 0.1), None, (7, 7))
    assert infer.cells()[1:3] == ["infer", "fp32"]
    assert len(infer.cells()) == len(expected)


def test_a_compiled_backbone_takes_the_same_steps(task, monkeypatch):
    """By the compiler's front, without what would generate code for minutes."""
    asked = []

    def compile_eagerly(module, **options):
        asked.append(options)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    weights = task.weights()
    plain, compiled = (
        detector_steps("native", task, weights, ["none"], flag)["infer", "none"]()
        for flag in (False, True)
    )
    assert asked == [{"dynamic": True}]
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours["boxes"], theirs["boxes"])
