"""The ResNet of a file: every fault is named."""

import pytest
import torch
import torchvision
from foreign_checkpoints import moco_checkpoint

from moco_det.common.errors import UserError
from moco_det.common.resnets import Architecture
from moco_det.weights.resnet import find_resnet


@pytest.mark.parametrize("memory", [{}, {"module.bank": torch.ones(50, 8)}])
def test_checkpoints_of_the_other_mechanisms(memory):
    """End-to-end has one encoder and no memory, a memory bank one encoder and the bank."""
    state = {k: v for k, v in moco_checkpoint()["state_dict"].items() if "encoder_q" in k} | memory
    source = find_resnet(state, {"arch": "resnet18"})
    heads = {f"module.encoder_q.fc.{kind}" for kind in ("weight", "bias")}
    assert set(source.dropped) == heads | memory.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer4.1.conv2.weight"), r"layer4\.1\.conv2\.weight is missing"),
        (lambda s: s.pop("layer2.0.bn1.running_var"), r"layer2\.0\.bn1\.running_var is missing"),
        (lambda s: s.pop("conv1.weight"), r"conv1\.weight is missing"),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("layer3.1.")],
            r"layer3\.1\.bn1\.bias is missing and 7 more$",
        ),
        (
            lambda s: s.update({"layer1.2.conv1.weight": torch.ones(64, 64, 3, 3)}),
            r"layer1\.2\.conv1\.weight is unexpected",
        ),
        (
            lambda s: s.update({"layer1.0.se.weight": torch.ones(1)}),
            r"unexpected keys in a MoCo checkpoint: module\.encoder_q\.layer1\.0\.se\.weight",
        ),
        (
            lambda s: s.update({"bn1.weight": torch.ones(32)}),
            r"bn1\.weight has the shape \(32,\), not \(64,\)",
        ),
        (
            lambda s: s["layer1.0.conv1.weight"].fill_(float("nan")),
            r"layer1\.0\.conv1\.weight is not finite",
        ),
    ],
)
def test_faulty_backbone_keys_are_named(change, message):
    encoder = dict(torchvision.models.resnet18().state_dict())
    change(encoder)
    state = {f"module.encoder_q.{name}": value for name, value in encoder.items()}
    with pytest.raises(UserError, match=message):
        find_resnet(state, {"arch": "resnet18"})


def test_unexpected_key_beside_the_encoders():
    state = moco_checkpoint()["state_dict"] | {"module.predictor.weight": torch.ones(1)}
    with pytest.raises(UserError, match=r"unexpected keys .*: module\.predictor\.weight$"):
        find_resnet(state, {})


def test_another_architecture_than_the_checkpoint_says():
    state = moco_checkpoint("resnet34")["state_dict"]
    with pytest.raises(UserError, match="says it holds a resnet50, its arrays are a ResNet-34"):
        find_resnet(state, {"arch": "resnet50"})


def test_small_stem_is_refused_with_the_reason():
    state = moco_checkpoint()["state_dict"]
    with pytest.raises(UserError, match="7x7 convolution of stride 2"):
        find_resnet(state, {"config": {"small_stem": True}})
    small = state | {"module.encoder_q.conv1.weight": torch.ones(64, 3, 3, 3)}
    with pytest.raises(UserError, match="7x7 convolution of stride 2"):
        find_resnet(small, {"config": {"small_stem": False}})
    assert find_resnet(state, {"config": {"small_stem": False}}).architecture == Architecture(18)


def test_unknown_schema():
    message = r"its names \(patch_embed\.proj\.weight, .* not those of a known kind"
    with pytest.raises(UserError, match=message):
        find_resnet({"patch_embed.proj.weight": torch.ones(1)}, {"arch": "vit_small"})


def test_two_resnets_in_one_file():
    state = {k: v for k, v in moco_checkpoint()["state_dict"].items() if "encoder_q" in k}
    state |= {name.removeprefix("module."): value for name, value in state.items()}
    with pytest.raises(UserError, match="two ResNets"):
        find_resnet(state, {})
