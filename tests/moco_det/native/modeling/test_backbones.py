"""ResNet and FPN against torchvision's networks and by hand; the dilated-C5 backbone likewise."""

import copy
import re

import pytest
import torch
import torchvision
from batch_norms import randomise_norms
from torch import nn

from moco_det.common.errors import UserError
from moco_det.common.resnets import BLOCKS
from moco_det.common.weight_layouts import rename
from moco_det.config.loading import get_cfg, load_config
from moco_det.native.modeling.backbones import FPN, DilatedC5, ResNet, build_backbone, build_resnet
from moco_det.weights.files import load_backbone_weights

ALL = ["res2", "res3", "res4", "res5"]


def from_torchvision(network: nn.Module) -> dict[str, torch.Tensor]:
    """A torchvision ResNet's weights under Detectron2's names, by rules written for this test."""
    state = {}
    for name, value in network.state_dict().items():
        if name.startswith("fc."):
            continue
        name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
        state[name if name.startswith("res") else f"stem.{name}"] = value
    return state


def torchvision_features(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    features = {}
    for index in range(1, 5):
        x = features[f"res{index + 1}"] = getattr(network, f"layer{index}")(x)
    return features


@pytest.mark.parametrize("depth", BLOCKS)
def test_a_config_may_ask_for_every_depth(repository, depth):
    options = [
        "MODEL.RESNETS.DEPTH",
        depth,
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        64 if depth < 50 else 256,
    ]
    with torch.device("meta"):
        model = build_resnet(load_config(repository / "configs/coco_R50_FPN_1x_moco.yaml", options))
        reference = torchvision.models.get_model(f"resnet{depth}")
    expected = {name: value.shape for name, value in from_torchvision(reference).items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == expected


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("depth", "norm"), [(18, "BN"), (34, "BN"), (50, "BN"), (50, "FrozenBN")])
def test_features_of_torchvision(depth, norm):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    randomise_norms(reference)
    width = 64 if depth < 50 else 256
    model = ResNet(depth, out_features=ALL, norm=norm, freeze_at=0, res2_channels=width).eval()
    state = from_torchvision(reference)
    if norm == "FrozenBN":
        state = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    model.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 70, 64)
    with torch.no_grad():
        expected, features = torchvision_features(reference, x), model(x)
    for name in ALL:
        torch.testing.assert_close(features[name], expected[name])
        assert features[name].shape[1] == model.channels[name]
        assert features[name].shape[3] == 64 // model.strides[name]


@pytest.mark.usefixtures("float64")
def test_dilated_res5_dilates_all_its_blocks():
    torch.manual_seed(0)
    reference = torchvision.models.resnet50(
        weights=None, replace_stride_with_dilation=[False, False, True]
    ).eval()
    randomise_norms(reference)
    # torchvision leaves the first block of the stage undilated; Detectron2 does not.
    reference.layer4[0].conv2.dilation = reference.layer4[0].conv2.padding = (2, 2)
    model = ResNet(50, out_features=["res5"], norm="BN", freeze_at=0, res5_dilation=2).eval()
    model.load_state_dict(from_torchvision(reference), strict=True)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, features = torchvision_features(reference, x), model(x)
    torch.testing.assert_close(features["res5"], expected["res5"])
    assert model.strides == {"res5": 16}


def test_stride_in_1x1():
    strides = {}
    for flag in (True, False):
        model = ResNet(50, out_features=ALL, norm="BN", freeze_at=0, stride_in_1x1=flag)
        strides[flag] = [
            (m[0].conv1.stride[0], m[0].conv2.stride[0]) for m in (model.res2, model.res5)
        ]
    assert strides == {True: [(1, 1), (2, 1)], False: [(1, 1), (1, 2)]}


def test_only_the_stages_in_use_are_built():
    model = ResNet(18, out_features=["res3"], norm="BN", freeze_at=0, res2_channels=64)
    assert [name for name, _ in model.named_children()] == ["stem", "res2", "res3"]
    assert set(model(torch.zeros(1, 3, 32, 32))) == {"res3"}


def test_frozen_stages_do_not_learn():
    model = ResNet(18, out_features=ALL, norm="SyncBN", freeze_at=2, res2_channels=64)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(("stem.", "res2.")), name
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()(torch.randn(2, 3, 64, 64))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved
    assert all(k.startswith(("res3.", "res4.", "res5.")) and "norm." in k for k in moved)
    # Freezing changes no key, so that a checkpoint loads whatever FREEZE_AT is.
    unfrozen = ResNet(18, out_features=ALL, norm="SyncBN", freeze_at=0, res2_channels=64)
    assert set(model.state_dict()) == set(unfrozen.state_dict())


def test_config_that_no_resnet_fits():
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = 18
    with pytest.raises(UserError, match="RES2_OUT_CHANNELS is 256; ResNet-18 .* needs 64"):
        build_resnet(cfg)
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.RESNETS.RES5_DILATION = 3
    with pytest.raises(UserError, match="RES5_DILATION is 3"):
        build_resnet(cfg)


def test_fpn_by_hand():
    """Identity convolutions on two levels: p3 = c3, p2 = c2 + upsampled c3, p4 = every other p3."""

    class BottomUp(nn.Module):
        channels = {"res2": 1, "res3": 1}
        strides = {"res2": 4, "res3": 8}

        def forward(self, x):
            return {"res2": x, "res3": 10 * x[..., ::2, ::2]}

    fpn = FPN(BottomUp(), ["res2", "res3"], out_channels=1, norm="")
    for name, parameter in fpn.named_parameters():
        nn.init.zeros_(parameter)
        if name.endswith("weight"):
            middle = parameter.shape[-1] // 2
            parameter.data[..., middle, middle] = 1
    x = torch.arange(16.0).view(1, 1, 4, 4)
    pyramid = fpn(x)
    coarse = torch.tensor([[0.0, 20.0], [80.0, 100.0]])
    assert torch.equal(pyramid["p3"][0, 0], coarse)
    upsampled = coarse.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(pyramid["p2"][0, 0], x[0, 0] + upsampled)
    assert pyramid["p4"].flatten().tolist() == [0.0]
    assert fpn.strides == {"p2": 4, "p3": 8, "p4": 16}
    assert fpn.size_divisibility == 8


@pytest.mark.parametrize(
    ("norm", "kind"), [("GN", nn.GroupNorm), ("BN", nn.BatchNorm2d), ("", None)]
)
def test_every_convolution_of_an_fpn_has_its_norm(norm, kind):
    bottom_up = ResNet(18, out_features=ALL, norm="BN", freeze_at=0, res2_channels=64)
    fpn = FPN(bottom_up, ["res4", "res5"], 32, norm)
    for name in ("fpn_lateral4", "fpn_output4", "fpn_lateral5", "fpn_output5"):
        conv = getattr(fpn, name)
        assert (conv.norm is None) if kind is None else isinstance(conv.norm, kind)
        assert (conv.bias is None) == bool(norm)


def test_fpn_levels_must_double_the_stride():
    bottom_up = ResNet(18, out_features=ALL, norm="BN", freeze_at=0, res2_channels=64)
    with pytest.raises(ValueError, match="do not double"):
        FPN(bottom_up, ["res2", "res4"], 8, "")


# -- dilated C5 -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    bottom_up = ResNet(50, out_features=["res5"], norm="BN", freeze_at=0, res5_dilation=2)
    return DilatedC5(bottom_up, 2048, 16, norm="BN")


def build(repository, *options):
    path = str(repository / "configs" / "voc_R50_DC5_24k_moco.yaml")
    return build_backbone(load_config(path, ["MODEL.DEVICE", "cpu", *options]))


def test_stride_and_width(backbone):
    assert (backbone.channels, backbone.strides) == ({"c5": 512}, {"c5": 16})
    with torch.no_grad():
        features = backbone.eval()(torch.rand(2, 3, 64, 96))
    assert {name: tuple(x.shape) for name, x in features.items()} == {"c5": (2, 512, 4, 6)}


def test_every_block_of_res5_is_dilated_the_first_too(backbone):
    convs = {name: conv for name, conv in backbone.named_modules() if isinstance(conv, nn.Conv2d)}
    dilated = [name for name, conv in convs.items() if conv.dilation == (2, 2)]
    assert dilated == [f"bottom_up.res5.{block}.conv2" for block in range(3)]
    assert all(conv.stride == (1, 1) for name, conv in convs.items() if ".res5." in name)
    # Seen from outside: what the first block makes of one pixel reaches two pixels away, no less.
    image = torch.zeros(1, 1024, 9, 9)
    image[0, :, 4, 4] = 1.0
    block = backbone.bottom_up.res5[0].eval()
    with torch.no_grad():
        changed = (block(image) != block(torch.zeros_like(image))).any(dim=1)[0]
    places = {(2, 2), (2, 4), (2, 6), (4, 2), (4, 4), (4, 6), (6, 2), (6, 4), (6, 6)}
    assert {tuple(place) for place in changed.nonzero().tolist()} == places


def test_features_of_torchvision_with_all_of_layer4_dilated(backbone):
    torch.manual_seed(1)
    network = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    network, backbone = network.double().eval(), copy.deepcopy(backbone).double()
    first = network.layer4[0].conv2
    assert first.dilation == (1, 1)  # torchvision's habit, and a trap
    first.dilation, first.padding = (2, 2), (2, 2)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    backbone.bottom_up.load_state_dict(rename(state, "torchvision", "detectron2"), strict=True)
    nn.init.uniform_(backbone.reduce.norm.weight)
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(image))))
        x = network.layer4(network.layer3(network.layer2(network.layer1(x))))
        # A 3x3 convolution and evaluation-mode BN at its initial statistics, no activation.
        x = torch.conv2d(x, backbone.reduce.weight, padding=1)
        norm = backbone.reduce.norm
        expected = x / (1 + norm.eps) ** 0.5 * norm.weight.view(-1, 1, 1)
        found = backbone.eval()(image)["c5"]
    assert (expected < 0).any()
    torch.testing.assert_close(found, expected)


def test_config_builds_it_with_a_trained_synchronised_norm(repository):
    backbone = build(repository)
    assert isinstance(backbone, DilatedC5)
    assert isinstance(backbone.reduce.norm, nn.SyncBatchNorm)
    assert backbone.reduce.bias is None
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert {name for name in backbone.state_dict() if "bottom_up" not in name} == {
        f"reduce.{name}"
        for name in (
            "weight",
            "norm.weight",
            "norm.bias",
            "norm.running_mean",
            "norm.running_var",
            "norm.num_batches_tracked",
        )
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.RESNETS.RES5_DILATION", "1"], "RES5_DILATION is 1; .* needs 2"),
        (["MODEL.RESNETS.OUT_FEATURES", "['res4']"], r"OUT_FEATURES is \['res4'\]; .* \['res5'\]"),
        (["MODEL.RESNETS.DEPTH", "18"], "DEPTH is 18; .* 50 or more"),
    ],
)
def test_a_resnet_that_is_not_dilated_is_refused(repository, options, message):
    with pytest.raises(UserError, match=f"MODEL.RESNETS.{message}"):
        build(repository, *options)


def test_converted_weights_load_by_the_ends_of_their_names(repository, tmp_path):
    source = ResNet(
        50, out_features=["res2", "res3", "res4", "res5"], norm="BN", freeze_at=0
    ).state_dict()
    torch.save({"model": source}, tmp_path / "moco.pth")
    model = nn.Module()
    model.backbone = build(repository)
    report = load_backbone_weights(model, tmp_path / "moco.pth")
    assert {name.split(".")[1] for name in report.missing} == {"reduce"}
    assert not report.unexpected
    assert torch.equal(model.backbone.bottom_up.res5[2].conv3.weight, source["res5.2.conv3.weight"])
