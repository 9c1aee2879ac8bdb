"""What can be the weights of a network, and whose prefixes their names lose."""

import math

import numpy as np
import pytest
import torch

from moco_det.common.errors import UserError
from moco_det.common.weight_checks import (
    checked_weights,
    describe_stripping,
    shorten,
    unwrapped,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_of_any_width_become_float32(dtype):
    found = checked_weights("a.pth", {"conv.weight": torch.tensor([0.5, -3.0], dtype=dtype)})
    assert found["conv.weight"].dtype == torch.float32
    assert found["conv.weight"].tolist() == [0.5, -3.0]


def test_counters_stay_whole_numbers():
    arrays = {"bn.num_batches_tracked": torch.tensor(7), "queue_ptr": torch.tensor([3])}
    found = checked_weights("a.pth", arrays | {"seen": np.int64(2)})
    assert [(v.dtype, int(v)) for v in found.values()] == [
        (torch.int64, 7),
        (torch.int64, 3),
        (torch.int64, 2),
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.weight", torch.tensor([1.0, math.nan]), "a.weight is not finite: it holds nan"),
        ("a.bias", torch.tensor([-math.inf]), "a.bias is not finite: it holds -inf"),
        ("a.weight", torch.tensor([1e300], dtype=torch.float64), "not finite: it holds inf"),
        ("bn.running_var", torch.tensor([1.0, -0.5]), "is a variance, but holds -0.5"),
        ("res2_0_branch2a_bn_riv", np.float32([-1]), "is a variance, but holds -1"),
        ("a.weight", torch.ones(2, 2).int(), "holds values of type int32"),
        ("a.weight", torch.ones(1).bool(), "holds values of type bool"),
        ("bn.num_batches_tracked", torch.tensor(True), "holds values of type bool"),
        ("queue", torch.ones(2, 2).long(), "holds values of type int64"),
        ("a.weight", torch.ones(2).cfloat(), "holds values of type complex64"),
        ("a.weight", torch.ones(0, 3), r"is empty: its shape is \(0, 3\)"),
        ("queue_ptr", torch.tensor([-1]), "is a count, but its value is -1"),
        ("a.weight", None, "is a NoneType, not an array"),
        ("a.weight", [1.0], "is a list, not an array"),
    ],
)
def test_what_is_no_weight_is_named(name, value, message):
    with pytest.raises(UserError, match=f"a.pth: {name} ?.*{message}|{message}") as refused:
        checked_weights("a.pth", {"fine": torch.ones(1), name: value})
    assert name in str(refused.value)


def test_names_that_are_equal_as_words():
    with pytest.raises(UserError, match="two arrays of one name"):
        checked_weights("a.pth", {1: torch.ones(1), "1": torch.ones(1)})


@pytest.mark.parametrize(
    ("name", "inner", "said"),
    [
        ("_orig_mod.conv1.weight", "conv1.weight", "'_orig_mod.' from 1 names"),
        ("module.conv1.weight", "conv1.weight", "'module.' from 1 names"),
        ("module._orig_mod.conv1.weight", "conv1.weight", "'module._orig_mod.' from 1 names"),
        ("model.encoder_q.conv1.weight", "encoder_q.conv1.weight", "'model.' from 1 names"),
        ("model.module.conv1.weight", "conv1.weight", "'model.module.' from 1 names"),
        ("encoder_q._orig_mod.bn1.bias", "encoder_q.bn1.bias", "'_orig_mod.' from 1 names"),
        ("backbone.stem.conv1.weight", "backbone.stem.conv1.weight", ""),
    ],
)
def test_wrappers(name, inner, said):
    assert unwrapped([name]) == {name: inner}
    assert describe_stripping(unwrapped([name])) == (f"stripped {said}" if said else "")


def test_names_that_would_become_one_keep_their_prefix():
    names = ["module.a", "a"]
    assert unwrapped(names) == {"module.a": "module.a", "a": "a"}


def test_a_line_has_room_for_so_many_names():
    assert shorten(["a", "b"]) == "a, b"
    assert shorten(["x" * 70] * 4, 150) == "x" * 70 + ", " + "x" * 70 + " and 2 more"
