"""The dilated-C5 backbone: geometry by hand, and torchvision's ResNet made dilated by hand."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from moco_det.common.errors import UserError
from moco_det.config.loading import load_config
from moco_det.native.modeling.backbones import DilatedC5, ResNet
from moco_det.native.modeling.rcnn import build_backbone
from moco_det.weights.loading import load_backbone_weights
from moco_det.weights.names import rename


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    bottom_up = ResNet(50, out_features=["res5"], norm="BN", freeze_at=0, res5_dilation=2)
    return DilatedC5(bottom_up, norm="BN")


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
