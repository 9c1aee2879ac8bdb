"""The schema of what a run continues from, and which of its files is whole."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

from moco_det.common.checkpoint_files import UnreadableFile
from moco_det.common.errors import UserError
from moco_det.common.resume_state import (
    StateFault,
    check_generators,
    check_number,
    check_optimizer,
    check_scaler,
    checked_schedule,
    newest_first,
    newest_whole,
)
from pretrain.engine.checkpoints import rng_states


def optimizer(steps=1) -> SGD:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    sgd = SGD([*model.parameters(), *frozen.parameters()], 0.1, 0.9)
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        sgd.step()
    return sgd


def changed(state: dict, *path) -> dict:
    """A copy with the value `path[-1]` at the path; without the entry where that is `del`."""
    *parents, key, value = path
    state = place = copy.deepcopy(state)
    for parent in parents:
        place = place[parent]
    if value == "del":
        del place[key]
    else:
        place[key] = value
    return state


def test_an_optimizer_takes_its_own_state_and_that_of_older_torch():
    state = optimizer().state_dict()
    check_optimizer(state, optimizer(0), stepped=True)
    check_optimizer(optimizer(0).state_dict(), optimizer(0), stepped=False)
    for key in ("maximize", "foreach", "differentiable", "fused"):
        state = changed(state, "param_groups", 0, key, "del")
    check_optimizer(state, optimizer(0), stepped=True, own=False)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("state", {}), r"state\[0\] has no momentum_buffer: the momentum would be lost"),
        (("state", 1, "del"), r"state\[1\] has no momentum_buffer"),
        (("state", 1, {}), r"state\[1\] has no momentum_buffer"),
        (("state", 0, None), r"state\[0\] has no momentum_buffer"),
        (("state", 9, {}), "has a parameter 9 that is in no group"),
        (("state", []), "optimizer.state is a list"),
        (("state", 0, "momentum_buffer", torch.ones(2, 2)), r"the shape \(2, 2\), not \(2, 3\)"),
        (("state", 0, "momentum_buffer", torch.full((2, 3), math.nan)), "is not finite"),
        (("state", 0, "momentum_buffer", torch.ones(2, 3).int()), "not a tensor of floats"),
        (("state", 0, "momentum_buffer", 1.0), "not a tensor of floats"),
        (("param_groups", []), "param_groups are 0, not 1"),
        (("param_groups", "del"), "param_groups is None, not a list"),
        (("param_groups", 0, None), r"param_groups\[0\] is None, not a dict"),
        (("param_groups", 0, "lr", -1.0), r"param_groups\[0\].lr is -1.0, not a number"),
        (("param_groups", 0, "lr", math.nan), "lr is nan"),
        (("param_groups", 0, "momentum", True), "momentum is True"),
        (("param_groups", 0, "dampening", "0"), "dampening is '0'"),
        (("param_groups", 0, "weight_decay", 10**400), "weight_decay is"),
        (("param_groups", 0, "fused", {}), "fused is a dict, not true or false"),
        (("param_groups", 0, "nesterov", "del"), "lacks nesterov"),
        (("param_groups", 0, "params", [0, 1]), "are 2 parameters, not the 4"),
        (("param_groups", 0, "params", [1, 0, 2, 3]), "in their order"),
    ],
)
def test_an_optimizer_refuses_what_it_would_have_died_of_or_lost(path, message):
    state = changed(optimizer().state_dict(), *path)
    with pytest.raises(StateFault, match=message):
        check_optimizer(state, optimizer(0), stepped=True)


def adam(steps=1) -> Adam:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    found = Adam(layer.parameters(), 0.1)
    for _ in range(steps):
        layer(torch.ones(1, 3)).sum().backward()
        found.step()
    return found


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("state", 1, "del"), r"state\[1\] has no exp_avg: the moments would be lost"),
        (("state", 1, {}), r"state\[1\] has no exp_avg"),
        (("state", 0, "exp_avg_sq", "del"), r"state\[0\] has no exp_avg_sq"),
        (("state", 0, "exp_avg", torch.ones(2, 2)), r"the shape \(2, 2\), not \(2, 3\)"),
        (("state", 0, "exp_avg_sq", torch.full((2, 3), math.inf)), "exp_avg_sq is not finite"),
        (("state", 0, "exp_avg_sq", torch.full((2, 3), -1.0)), "exp_avg_sq is negative"),
        (("state", 0, "step", torch.tensor(-1.0)), "not a tensor of the steps taken"),
        (("state", 0, "step", "del"), "step is None"),
        (("param_groups", 0, "betas", (0.9, 1.5)), "betas is 1.5, not a number"),
        (("param_groups", 0, "betas", 0.9), "betas is 0.9, not a list of 2"),
        (("param_groups", 0, "betas", "del"), "lacks betas"),
        (("param_groups", 0, "eps", math.nan), "eps is nan"),
        (("param_groups", 0, "amsgrad", 1), "amsgrad is 1, not true or false"),
    ],
)
def test_adam_refuses_what_it_would_have_died_of_or_lost(path, message):
    state = adam().state_dict()
    check_optimizer(state, adam(0), stepped=True)
    check_optimizer(adam(0).state_dict(), adam(0), stepped=False)
    with pytest.raises(StateFault, match=message):
        check_optimizer(changed(state, *path), adam(0), stepped=True)


def test_one_optimizer_takes_no_state_of_the_other():
    for saved, other, lacking in (
        (adam(), optimizer(0), "dampening"),
        (optimizer(), adam(0), "amsgrad"),
    ):
        saved.param_groups[0]["params"] = saved.param_groups[0]["params"][:2]
        with pytest.raises(StateFault, match=lacking):
            check_optimizer(saved.state_dict(), other, stepped=True)


def test_a_schedule_keeps_its_methods_and_stands_on_the_step():
    scheduler = LambdaLR(optimizer(), lambda step: 0.5**step)
    scheduler.step()
    state = scheduler.state_dict()
    assert checked_schedule(state | {"step": 5}, scheduler, 1).keys() == state.keys()
    for path, message in (
        (("last_epoch", 2), "last_epoch is 2 after 1 steps"),
        (("last_epoch", -1), "last_epoch is -1, not a whole number"),
        (("base_lrs", [0.1, 0.1]), "base_lrs is a list, not a list of 1"),
        (("base_lrs", [math.inf]), "base_lrs is inf"),
        (("_last_lr", "del"), "_last_lr is None"),
        (("_step_count", 1.5), "_step_count is 1.5"),
        (("lr_lambdas", [{}]), "lr_lambdas is a dict"),
    ):
        with pytest.raises(StateFault, match=message):
            checked_schedule(changed(state, *path), scheduler, 1)


def test_a_gradient_scaler():
    state = torch.amp.GradScaler("cpu").state_dict()
    assert check_scaler(state) == state
    assert check_scaler({}) == {}
    for path in (("scale", 0.0), ("scale", "del"), ("_growth_tracker", None)):
        with pytest.raises(StateFault, match=f"scaler.{path[0]}"):
            check_scaler(changed(state, *path))


@pytest.mark.parametrize(
    "path",
    [
        ("torch", True),
        ("torch", torch.zeros(3, dtype=torch.uint8)),
        ("torch", torch.zeros(5056)),
        ("cuda", None),
        ("cuda", [None]),
        ("python", "del"),
        ("python", (3, (1, 2), None)),
        ("python", (3, (-1,) * 625, None)),
        ("python", (3, (1,) * 624 + (2**31,), None)),
        ("python", (9, (1,) * 625, None)),
        ("python", (3, (1,) * 625, "x")),
        ("numpy", ("MT19937",)),
        ("numpy", ("x", torch.zeros(624, dtype=torch.int64), 0, 0, 0.0)),
        ("numpy", ("MT19937", torch.full((624,), -1), 0, 0, 0.0)),
        ("numpy", ("MT19937", torch.zeros(624, dtype=torch.int64), 625, 0, 0.0)),
        ("numpy", ("MT19937", torch.zeros(624, dtype=torch.int64), 0, 0, math.nan)),
    ],
)
def test_generators(path):
    (state,) = rng_states()
    check_generators("rng[0]", state)
    with pytest.raises(StateFault, match=rf"rng\[0\]\.{path[0]}"):
        check_generators("rng[0]", changed(state, *path))


@pytest.mark.parametrize("value", [None, True, "1", math.nan, math.inf, 10**400, -1, [1]])
def test_what_is_no_number(value):
    with pytest.raises(StateFault, match="step is"):
        check_number("step", value)


# -- which file -----------------------------------------------------------------------------------


def read(path):
    text = path.read_text() if path.exists() else "damaged"
    if text == "damaged":
        raise UnreadableFile(f"{path.name} is damaged")
    if text == "foreign":
        raise UserError("another architecture")
    return text


def test_the_newest_whole_one_stands_in_for_a_damaged_last_one(tmp_path, capsys):
    for name, text in (("a_2.pth", "two"), ("a_10.pth", "ten"), ("a_11.pth", "damaged")):
        (tmp_path / name).write_text(text)
    last = tmp_path / "a_11.pth"
    assert newest_whole(last, tmp_path.glob("*.pth"), read) == (tmp_path / "a_10.pth", "ten")
    said = capsys.readouterr().out
    assert said.startswith("warning: a_11.pth is damaged; going on from ")
    assert "a_10.pth" in said
    for name in ("a_2.pth", "a_10.pth"):
        (tmp_path / name).write_text("damaged")
    with pytest.raises(UserError, match="a_11.pth is damaged; no other checkpoint beside it"):
        newest_whole(last, tmp_path.glob("*.pth"), read)


def test_only_damage_leads_to_an_older_one(tmp_path):
    (tmp_path / "a_1.pth").write_text("one")
    (tmp_path / "a_2.pth").write_text("foreign")
    with pytest.raises(UserError, match="another architecture"):
        newest_whole(tmp_path / "a_2.pth", tmp_path.glob("*.pth"), read)


def test_last_checkpoint_names_it(tmp_path, capsys):
    tag = tmp_path / "last_checkpoint"
    assert newest_whole(tag, [], read) is None
    (tmp_path / "model_3.pth").write_text("three")
    tag.write_text("model_3.pth\n")
    assert newest_whole(tag, [], read) == (tmp_path / "model_3.pth", "three")
    for damage in ("model_4.pth", "", "\0\0"):
        tag.write_text(damage)
        found = newest_whole(tag, tmp_path.glob("*.pth"), read)
        assert found == (tmp_path / "model_3.pth", "three")
        assert "warning: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../other/model_3.pth", "/etc/passwd", ".."])
def test_last_checkpoint_stays_within_its_folder(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_checkpoint").write_text(name)
    with pytest.raises(UserError, match="outside of its folder"):
        newest_whole(tmp_path / "run" / "last_checkpoint", [], read)


def test_names_without_a_number_are_the_newest(tmp_path):
    names = ["model_0000009.pth", "model_final.pth", "model_0000010.pth"]
    found = newest_first(tmp_path / name for name in names)
    assert [path.name for path in found] == [
        "model_final.pth",
        "model_0000010.pth",
        "model_0000009.pth",
    ]
