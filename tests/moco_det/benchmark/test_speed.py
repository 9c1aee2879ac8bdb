"""The detector benchmark does the work it times; how long that takes is no test."""

import pytest
import torch

from moco_det.benchmark.speed import DetectorTask, detector_memory, detector_steps
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
