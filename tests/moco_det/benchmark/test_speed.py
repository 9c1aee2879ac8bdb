"""The detector benchmark does the work it times; how long that takes is no test."""

from types import SimpleNamespace

import pytest
import torch

from moco_det.benchmark import speed
from moco_det.benchmark.speed import (
    DetectorTask,
    alternate,
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
        (found,) = step() or [None]
        assert model.training == (phase == "train")
        if phase == "infer":
            assert len(found["boxes"]) > 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name  # so that the work stays the same


@pytest.mark.usefixtures("forked_launches")
def test_memory_of_a_process_of_its_own(task):
    peak = detector_memory("native", task, task.weights(), "none")
    assert 2**27 < peak < 2**34  # torch alone takes more than the one, nothing here the other


# -- clocks ---------------------------------------------------------------------------------------


def test_candidates_take_turns_after_a_round_that_is_not_timed(monkeypatch):
    """Seconds of each turn, by hand; what runs on a device is waited for within its turn."""
    now, calls = [0.0], []
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    lengths = iter([100.0, 90.0, 1.0, 10.0, 5.0, 30.0, 2.0, 20.0])

    def candidate(name):
        def run():
            calls.append(name)
            now[0] += next(lengths)

        return run

    def synchronize():
        calls.append("wait")
        now[0] += 0.25

    found = alternate({"a": candidate("a"), "b": candidate("b")}, 3, synchronize)
    assert found == {"a": 2.25, "b": 20.25}
    assert calls == ["a", "wait", "b", "wait"] * 4
