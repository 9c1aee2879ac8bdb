"""Which part of the machine a run gets."""

import pytest
import torch

from moco_det.benchmark.jobs import local
from moco_det.common.errors import UserError


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def devices(found):
    return [place["CUDA_VISIBLE_DEVICES"] for place in found]


def test_gpus_are_dealt_out_in_groups(gpus):
    gpus(8)
    assert devices(local.places(1, None)) == list("01234567")
    assert devices(local.places(4, None)) == ["0,1,2,3", "4,5,6,7"]
    assert devices(local.places(3, None)) == ["0,1,2", "3,4,5"]  # two are left over
    assert devices(local.places(2, 3)) == ["0,1", "2,3", "4,5"]


def test_only_visible_gpus_are_used(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert devices(local.places(1, None)) == ["5", "GPU-7"]


def test_too_few_gpus_are_told(gpus):
    gpus(2)
    with pytest.raises(UserError, match="--gpus-per-run 4: only 2 are visible"):
        local.places(4, None)


def test_without_gpus_the_cores_are_shared(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(local, "_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert local.places(1, None) == [{"OMP_NUM_THREADS": "8"}]
    assert local.places(1, 2) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert local.places(2, 2) == [{"OMP_NUM_THREADS": "2"}] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local.places(1, 2) == [{}, {}]
