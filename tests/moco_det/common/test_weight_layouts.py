"""The name table against the converters it must agree with and names known by hand; the layouts
against what the public code of others writes."""

import pytest
import torch
import torchvision
from float64 import ROUNDING
from foreign_checkpoints import RECORDED, arrays_of, numbered, state_of, write_foreign
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, ResNet

from moco_det.common.errors import UserError
from moco_det.common.resnets import WidenedResNet
from moco_det.common.weight_layouts import find_backbone, name_map
from moco_det.common.weight_sources import read_state_dict

RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_64x4d", "wide_resnet50_2",
)  # fmt: skip


def meta_state(arch: str) -> dict:
    with torch.device("meta"):
        state = torchvision.models.get_model(arch).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def official_rule(name: str) -> str:
    """What facebookresearch/moco's detection/convert-pretrain-to-detectron2.py makes of a name,
    after it has taken off `module.encoder_q.`."""
    if "layer" not in name:
        name = "stem." + name
    for t in (1, 2, 3, 4):
        name = name.replace(f"layer{t}", f"res{t + 1}")
    for t in (1, 2, 3):
        name = name.replace(f"bn{t}", f"conv{t}.norm")
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


@pytest.mark.parametrize("arch", RESNETS)
def test_agrees_with_the_official_rule_on_every_backbone_key(arch):
    names = name_map("torchvision", "detectron2")
    keys = list(meta_state(arch))
    assert [names[key] for key in keys] == [official_rule(key) for key in keys]


def test_both_directions_are_inverse():
    there, back = name_map("torchvision", "detectron2"), name_map("detectron2", "torchvision")
    assert {back[new]: new for new in back} == there


def test_caffe2_names_known_by_hand():
    names = name_map("caffe2", "detectron2")
    assert names["conv1_w"] == "stem.conv1.weight"
    assert names["res_conv1_bn_s"] == "stem.conv1.norm.weight"
    assert names["res_conv1_bn_beta"] == "stem.conv1.norm.bias"
    assert names["res2_0_branch1_w"] == "res2.0.shortcut.weight"
    assert names["res2_0_branch1_bn_b"] == "res2.0.shortcut.norm.bias"
    assert names["res4_22_branch2a_w"] == "res4.22.conv1.weight"
    assert names["res5_2_branch2b_bn_running_mean"] == "res5.2.conv2.norm.running_mean"
    assert names["res5_2_branch2c_bn_riv"] == "res5.2.conv3.norm.running_var"


def test_caffe2_names_agree_with_detectron2():
    loading = pytest.importorskip("detectron2.checkpoint.c2_model_loading")
    names = name_map("caffe2", "detectron2")
    old = [name for name in names if "num_batches_tracked" not in name]  # Caffe2 counts no batches
    assert [names[name] for name in old] == loading.convert_basic_c2_names(old)


# -- the checkpoints of others ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    """A small ResNet of which no two arrays are equal."""
    torch.manual_seed(0)
    network = WidenedResNet(0.25, BasicBlock, [2, 2, 2, 2], num_classes=8)
    for index, value in enumerate(network.state_dict().values()):
        if value.dim() == 1:
            value.uniform_(0.5, 1.5)
        elif value.dim() == 0:
            value.fill_(index)
    return network


@pytest.mark.parametrize("name", RECORDED)
def test_a_checkpoint_is_known_by_its_names_and_read_to_the_bit(tmp_path, encoder, name):
    recorded = RECORDED[name]
    path = write_foreign(tmp_path / "a.pth", name, encoder)
    weights, metadata = read_state_dict(path)
    found = find_backbone(weights)
    assert found.layout.title == recorded["title"]
    arrays, expected = found.arrays(weights), arrays_of(encoder)
    assert arrays.keys() == expected.keys()
    assert all(torch.equal(arrays[key], expected[key]) for key in expected)
    assert set(found.kept) | set(found.dropped) == set(state_of(name, encoder))
    line = found.describe("ResNet-18", metadata)
    assert line.startswith(f"{recorded['title']}, ResNet-18")
    assert "\n" not in line
    assert "''" not in line
    networks = {"student", "model_ema", "target_network_state_dict"} & set(recorded["beside"])
    assert all(entry in line.partition("dropped: ")[2] for entry in networks)
    more = len(recorded["resnets"]) > 1 or recorded["others"] != {} or networks
    assert ("dropped: " in line) == bool(more)


@pytest.mark.parametrize("name", RECORDED)
def test_an_array_too_few_or_too_many_is_noticed(encoder, name):
    """An array of the backbone that a ResNet has not; another network beside it may be anything."""
    taken = RECORDED[name]["taken"]
    state = state_of(name, encoder)
    first = "4" if RECORDED[name]["resnets"][taken] == "numbered" else "layer1"
    with pytest.raises(UserError, match=r"unexpected keys in a .*\.0\.se\.weight"):
        find_backbone([*state, f"{taken}{first}.0.se.weight"])
    with pytest.raises(UserError, match=r"its names \(.*\) are not those of a known kind of file"):
        find_backbone([f"other.{key}" for key in state if key not in ("queue", "queue_ptr")])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("DINO", "its teacher, the moving average that its own evaluation takes"),
        ("lightly DINO", "its teacher"),
        ("byol-pytorch", "its online network"),
        ("PyTorch-BYOL", "its online network"),
        ("SimSiam", "2 parts dropped: encoder.fc, predictor"),
        ("MoCo v3", "3 parts dropped: momentum_encoder, base_encoder.fc, predictor"),
        ("DenseCL", "encoder_q, encoder_k"),
    ],
)
def test_the_choice_among_networks_is_said(tmp_path, encoder, name, said):
    weights, metadata = read_state_dict(write_foreign(tmp_path / "a.pth", name, encoder))
    assert said in find_backbone(weights).describe("ResNet-18", metadata)


@pytest.mark.parametrize(
    "prefix", ["backbone.", "encoder.", "model.encoder.", "_orig_mod.encoder."]
)
def test_modules_of_lightning_that_nobody_knows(encoder, prefix):
    arrays = arrays_of(encoder)
    state = {f"{prefix}{name}": value for name, value in arrays.items()}
    found = find_backbone([*state, "my_own_head.weight"])
    assert found.layout.title == "Lightning checkpoint"
    assert found.arrays(state).keys() == arrays.keys()
    assert found.dropped == ("my_own_head.weight",)


def test_the_line_is_one_whatever_the_file_calls_its_parts(tmp_path, encoder):
    state = state_of("SimSiam", encoder) | {"a\nb\x1b[31m.weight": torch.ones(1)}
    other = {"x": torch.ones(2, 2)}
    torch.save({"state_dict": state, 7: other, "__network__": [1]}, tmp_path / "a.pth")
    weights, metadata = read_state_dict(tmp_path / "a.pth")
    line = find_backbone(weights).describe("ResNet-18", metadata)
    assert line.isprintable()
    assert line.startswith("SimSiam checkpoint, ResNet-18; 4 parts dropped: ")
    assert line.endswith(", 7")


def test_an_unknown_layout_is_told_by_its_first_ten_names():
    with pytest.raises(UserError) as refused:
        find_backbone([f"blocks.{i}.attn.qkv.weight" for i in range(12)])
    message = str(refused.value)
    assert "blocks.0.attn.qkv.weight, blocks.1." in message
    assert "blocks.9." in message
    assert "blocks.10." not in message
    titles = {recorded["title"].removesuffix(" checkpoint") for recorded in RECORDED.values()}
    assert all(title in message for title in titles)
    assert len(titles) > 15


def in_modules(prefix: str, network: nn.Module) -> nn.Module:
    """The network as a part of others, whose names have that prefix."""
    for part in reversed(prefix.removesuffix(".").split(".")):
        outer = nn.Module()
        outer.add_module(part, network)
        network = outer
    return network


class PaddedResNet(ResNet):
    """SwAV's and VICReg's: zeros around the image, and fewer in the first convolution."""

    def __init__(self):
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1.padding = (2, 2)
        self.fc = nn.Identity()

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class FeatureBlocks(nn.Module):
    """VISSL's trunk: a ModuleDict of torchvision's layers."""

    def __init__(self):
        super().__init__()
        network = ResNet(BasicBlock, [2, 2, 2, 2])
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4",
                 "avgpool")  # fmt: skip
        self._feature_blocks = nn.ModuleDict({name: getattr(network, name) for name in names})

    def forward(self, x):
        for block in self._feature_blocks.values():
            x = block(x)
        return x.flatten(1)


@pytest.mark.parametrize(
    ("title", "build", "prefix", "beside"),
    [
        ("SwAV checkpoint", PaddedResNet, "", {"prototypes.weight": torch.ones(1)}),
        ("VICReg checkpoint", PaddedResNet, "backbone.", {"projector.0.weight": torch.ones(1)}),
        ("VISSL checkpoint", FeatureBlocks, "", {}),
        ("lightly checkpoint", lambda: numbered(resnet18()), "backbone.", {}),
        ("PyTorch-BYOL checkpoint", lambda: numbered(resnet18()), "encoder.", {}),
    ],
)
def test_networks_that_are_not_torchvisions_give_its_features(title, build, prefix, beside):
    torch.manual_seed(0)
    network, ours = build(), resnet18()
    for value in network.state_dict().values():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5)
    whole = in_modules(prefix, network) if prefix else network
    state = whole.state_dict() | beside
    found = find_backbone(state)
    assert found.layout.title == title
    ours.fc = nn.Identity()
    ours.load_state_dict(found.arrays(state))
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = network.double().eval()(image).flatten(1)
        difference = (ours.double().eval()(image) - expected).abs().max() / expected.abs().max()
    assert difference < ROUNDING
