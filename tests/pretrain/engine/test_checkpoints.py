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
from pretrain.evaluation.classification import BEST


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.pth.tar").write_text("no checkpoint")
    with pytest.raises(UserError, match="notes.pth.tar is damaged or no checkpoint"):
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


def damage(path):
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((8,), 2.0).numpy().tobytes())] ^= 1
    path.write_bytes(data)


def test_auto_takes_the_newest_whole_one_where_the_last_is_damaged(tmp_path, capsys):
    weights = {"module.w": torch.full((8,), 2.0)}
    for epoch in (8, 9, 10):
        path = tmp_path / f"checkpoint_{epoch:04d}.pth.tar"
        checkpoints.save({"state_dict": weights, "epoch": epoch}, path)
    checkpoints.save({"state_dict": weights, "epoch": 10}, tmp_path / LAST)
    for name in (LAST, "checkpoint_0010.pth.tar"):
        damage(tmp_path / name)  # which torch does not notice
        assert torch.load(tmp_path / name, weights_only=True)["epoch"] == 10
    found = checkpoints.find("auto", tmp_path)
    assert (found.path.name, found.state["epoch"]) == ("checkpoint_0009.pth.tar", 9)
    said = capsys.readouterr().out
    assert f"{LAST} is damaged or no checkpoint: the checksum of " in said
    assert "checkpoint_0009.pth.tar, the newest that is whole" in said
    with pytest.raises(UserError, match="checksum"):
        checkpoints.find(str(tmp_path / LAST), tmp_path)
    for number in (8, 9):
        damage(tmp_path / f"checkpoint_{number:04d}.pth.tar")
    with pytest.raises(UserError, match="no other checkpoint beside it is whole"):
        checkpoints.find("auto", tmp_path)


def test_a_classifier_s_best_stands_in_for_its_damaged_last_one(tmp_path, capsys):
    """It keeps no others."""
    for name, epoch in ((LAST, 3), (BEST, 2)):
        state = {"state_dict": {"module.w": torch.full((8,), 2.0)}, "epoch": epoch}
        checkpoints.save(state, tmp_path / name)
    damage(tmp_path / LAST)
    found = checkpoints.find("auto", tmp_path)
    assert (found.path.name, found.state["epoch"]) == (BEST, 2)
    assert f"{BEST}, the newest that is whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"epoch": None}, "epoch is None"),
        ({"epoch": 1.5}, "epoch is 1.5"),
        ({"step": -1}, "step is -1"),
        ({"step": 10**30}, "step is 1000"),
        ({"step_in_epoch": True}, "step_in_epoch is True"),
        ({"arch": 7}, "arch is 7"),
        ({"config": []}, "config is a list"),
        ({"config": {"seed": "7"}}, "config.seed is '7'"),
        ({"config": {"batch_size": -4}}, "config.batch_size is -4"),
        ({"loss": None}, "loss is None"),
        ({"scaler": {"scale": -1}}, "scaler.scale is -1"),
        ({"best_acc1": float("nan")}, "best_acc1 is nan"),
        ({"rng": {}}, "rng is a dict"),
        ({"rng": [None]}, r"rng\[0\] is None"),
        ({"data": {"processes": [{"turn": 0, "positions": [[-1, 0]]}]}}, "positions is -1"),
        ({"data": {"processes": [{"turn": "x", "positions": []}]}}, "turn is 'x'"),
        ({"state_dict": {"queue": torch.ones(2, 3), "queue_ptr": torch.tensor([3])}}, "queue_ptr"),
        ({"state_dict": {"w": torch.tensor([float("nan")])}}, "w is not finite"),
        ({"state_dict": {"bn.running_var": torch.tensor([-1.0])}}, "running_var is a variance"),
        ({"state_dict": []}, "no 'state_dict'"),
    ],
)
def test_what_a_run_continues_from_has_a_schema(tmp_path, entry, message):
    checkpoints.save({"state_dict": {}, "epoch": 1} | entry, tmp_path / "a.pth.tar")
    with pytest.raises(UserError, match=message):
        checkpoints.find(str(tmp_path / "a.pth.tar"), tmp_path)


def test_prefixes_of_wrappers_are_stripped_and_said(tmp_path, capsys):
    for prefix in ("_orig_mod.", "module._orig_mod.", "model."):
        torch.save({"state_dict": {f"{prefix}encoder_q.w": torch.ones(1)}}, tmp_path / "a.pth.tar")
        assert checkpoints.weights(checkpoints.load(tmp_path / "a.pth.tar")) == {
            "encoder_q.w": torch.ones(1)
        }
        assert f"stripped {prefix!r} from 1 names" in capsys.readouterr().out
    torch.save({"state_dict": {"module.encoder_q.w": torch.ones(1)}}, tmp_path / "a.pth.tar")
    checkpoints.load(tmp_path / "a.pth.tar")
    assert not capsys.readouterr().out


def test_the_newest_epochs_are_kept_and_each_of_some_number_for_good(tmp_path):
    for epoch in range(1, 8):
        checkpoints.save({"state_dict": {}, "epoch": epoch}, tmp_path / LAST)
        checkpoints.keep_epoch(tmp_path, epoch, keep=2, save_every=3)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint_0*"))
    assert kept == [f"checkpoint_000{epoch}.pth.tar" for epoch in (2, 5, 6)]
    assert checkpoints.load(tmp_path / "checkpoint_0002.pth.tar")["epoch"] == 3
    assert (tmp_path / "checkpoint_0006.pth.tar").samefile(tmp_path / LAST)  # no second copy


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


def test_a_worker_that_is_killed_while_a_checkpoint_is_written_is_no_full_disk(
    tmp_path, monkeypatch
):
    """torch raises its error about it wherever the process is."""

    def killed(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(RuntimeError, match="DataLoader worker") as raised:
        checkpoints.save({}, tmp_path / "checkpoint_last.pth.tar")
    assert not isinstance(raised.value, UserError)
    assert list(tmp_path.iterdir()) == []
