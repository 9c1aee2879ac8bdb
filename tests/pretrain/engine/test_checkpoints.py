"""Checkpoints as files: found, kept, refused, and what they restore."""

import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from moco_det.common.errors import UserError
from pretrain.engine import checkpoints
from pretrain.engine.checkpoints import LAST, Checkpoint


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.pth.tar").write_text("no checkpoint")
    with pytest.raises(UserError, match="not a checkpoint that can be read safely"):
        checkpoints.load(tmp_path / "notes.pth.tar")
    torch.save({"epoch": 1}, tmp_path / "other.pth.tar")
    with pytest.raises(UserError, match="no 'state_dict'"):
        checkpoints.load(tmp_path / "other.pth.tar")


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    torch.save({"state_dict": {}, "payload": Payload()}, tmp_path / "evil.pth.tar")
    with pytest.raises(UserError, match="read safely"):
        checkpoints.load(tmp_path / "evil.pth.tar")
    assert not (tmp_path / "ran").exists()


def test_auto_finds_the_last_checkpoint_if_there_is_one(tmp_path):
    assert checkpoints.find("", tmp_path) is None
    assert checkpoints.find("auto", tmp_path) is None
    checkpoints.save({"state_dict": {}, "epoch": 3}, tmp_path / LAST)
    found = checkpoints.find("auto", tmp_path)
    assert (found.path, found.state["epoch"]) == (tmp_path / LAST, 3)
    with pytest.raises(UserError, match="no checkpoint at .*absent"):
        checkpoints.find(str(tmp_path / "absent"), tmp_path)


def test_the_newest_epochs_are_kept_and_each_of_some_number_for_good(tmp_path):
    for epoch in range(1, 8):
        checkpoints.save({"state_dict": {}, "epoch": epoch}, tmp_path / LAST)
        checkpoints.keep_epoch(tmp_path, epoch, keep=2, save_every=3)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint_0*"))
    assert kept == [f"checkpoint_000{epoch}.pth.tar" for epoch in (3, 6, 7)]
    assert checkpoints.load(tmp_path / "checkpoint_0003.pth.tar")["epoch"] == 3
    assert (tmp_path / "checkpoint_0007.pth.tar").samefile(tmp_path / LAST)  # no second copy


def test_weights_go_out_and_back_under_the_official_names(tmp_path):
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    state = {"arch": "resnet18", "state_dict": checkpoints.model_state(one)}
    assert set(state["state_dict"]) == {"module.weight", "module.bias"}
    checkpoints.load_model(two, Checkpoint(tmp_path, state), "resnet18")
    assert torch.equal(one.weight, two.weight)
    with pytest.raises(UserError, match="holds a resnet18, not a resnet50: pass -a resnet18"):
        checkpoints.load_model(two, Checkpoint(tmp_path, state), "resnet50")
    with pytest.raises(UserError, match="does not fit this model; check --moco-dim"):
        checkpoints.load_model(nn.Linear(3, 4), Checkpoint(tmp_path, state), "resnet18")


def test_generators_continue_where_they_were_saved(tmp_path):
    def draws():
        return [torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()]

    (state,) = checkpoints.rng_states()
    expected = draws()
    checkpoints.save({"state_dict": {}, "rng": [state]}, tmp_path / LAST)
    assert draws() != expected
    checkpoints.restore_rng(checkpoints.load(tmp_path / LAST)["rng"][0])
    assert draws() == expected
