"""Wider and narrower ResNets, by their shapes and by torchvision's own network; which one it is."""

import pytest
import torch
import torchvision
from torchvision.models import resnet

from moco_det.common.resnets import Architecture, WidenedResNet, infer_architecture

RESNETS = {
    "resnet18": Architecture(18),
    "resnet34": Architecture(34),
    "resnet50": Architecture(50),
    "resnet101": Architecture(101),
    "resnet152": Architecture(152),
    "resnext50_32x4d": Architecture(50, 32, 4),
    "resnext101_64x4d": Architecture(101, 64, 4),
    "wide_resnet50_2": Architecture(50, 1, 128),
}
# The paper's wider encoders, which torchvision has no name for.
WIDENED = {
    0.25: Architecture(50, 1, 16, 0.25),
    2: Architecture(50, 1, 128, 2),
    4: Architecture(50, 1, 256, 4),
}


def meta_state(arch: str) -> dict:
    with torch.device("meta"):
        state = torchvision.models.get_model(arch).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
@pytest.mark.parametrize("factor", [0.25, 2])
def test_every_layer_has_that_many_times_the_channels(block, factor):
    layers = [1, 2, 1, 1]
    with torch.device("meta"):
        plain = resnet.ResNet(block, layers).state_dict()
        wide = WidenedResNet(factor, block, layers).state_dict()
    assert wide.keys() == plain.keys()
    for name, value in plain.items():
        channels = [int(side * factor) for side in value.shape[:2]]
        if name == "conv1.weight":
            channels[1] = 3  # the image's
        elif name.startswith("fc."):
            channels[0] = 1000  # the classes
        assert wide[name].shape == (*channels[: value.dim()], *value.shape[2:]), name


def test_factor_1_is_torchvisions_network():
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = resnet.resnet18(num_classes=5).eval()
    ours = WidenedResNet(1, resnet.BasicBlock, [2, 2, 2, 2], num_classes=5).eval()
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours(image), plain(image))


@pytest.mark.parametrize("arch", RESNETS)
def test_infers_depth_and_width_from_shapes(arch):
    assert infer_architecture(meta_state(arch)) == RESNETS[arch]


def test_a_backbone_without_its_last_stage_has_a_depth():
    state = {k: v for k, v in meta_state("resnet101").items() if not k.startswith("layer4.")}
    assert infer_architecture(state) == Architecture(101)


def test_unknown_numbers_of_blocks_are_no_architecture():
    state = {k: v for k, v in meta_state("resnet50").items() if not k.startswith("layer3.5.")}
    assert infer_architecture(state) is None
    assert infer_architecture({"conv1.weight": torch.empty(64, 3, 7, 7)}) is None


@pytest.mark.parametrize("factor", WIDENED)
def test_a_widened_resnet_has_the_factor_in_every_channel(factor):
    with torch.device("meta"):
        built = WIDENED[factor].build().state_dict()
    assert infer_architecture(built) == WIDENED[factor]
    for name, value in meta_state("resnet50").items():
        fixed = {1} if name == "conv1.weight" else set()
        wanted = [n * factor if i in {0, 1} - fixed else n for i, n in enumerate(value.shape)]
        assert list(built[name].shape) == wanted, name
    assert str(WIDENED[factor]) == f"ResNet-50w{factor}x"


@pytest.mark.parametrize("arch", ["resnet34", "wide_resnet50_2", "resnext50_32x4d"])
def test_builds_the_network_of_torchvision(arch):
    with torch.device("meta"):
        built = RESNETS[arch].build().state_dict()
    shapes = {name: value.shape for name, value in built.items() if not name.startswith("fc.")}
    assert shapes == {name: value.shape for name, value in meta_state(arch).items()}


def test_required_config_of_a_widened_resnet():
    config = WIDENED[4].config()
    keys = ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP", "NUM_GROUPS", "DEPTH")
    assert [config[f"MODEL.RESNETS.{key}"] for key in keys] == [256, 1024, 256, 1, 50]


def test_required_config_is_torchvisions_preprocessing():
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    config = Architecture(50).config()
    assert config["MODEL.PIXEL_MEAN"] == pytest.approx([255 * m for m in weights.mean])
    assert config["MODEL.PIXEL_STD"] == pytest.approx([255 * s for s in weights.std])
    assert config["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    assert "MODEL.RESNETS.STRIDE_IN_1X1" not in Architecture(18).config()  # it has no 1x1


@pytest.mark.parametrize(
    ("architecture", "channels", "bottleneck"),
    [
        (Architecture(18), (64, 64), {}),
        (Architecture(50), (64, 256), {"NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64}),
        (Architecture(50, 32, 8), (64, 256), {"NUM_GROUPS": 32, "WIDTH_PER_GROUP": 8}),
        (Architecture(50, 1, 128, 2), (128, 512), {"NUM_GROUPS": 1, "WIDTH_PER_GROUP": 128}),
    ],
)
def test_the_whole_required_config(architecture, channels, bottleneck):
    """RGB in the scale of ImageNet, as MoCo and torchvision train."""
    resnets = {"DEPTH": architecture.depth, "STEM_OUT_CHANNELS": channels[0]}
    resnets |= {"RES2_OUT_CHANNELS": channels[1], **bottleneck}
    if bottleneck:
        resnets["STRIDE_IN_1X1"] = False
    assert architecture.config() == {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    } | {f"MODEL.RESNETS.{key}": value for key, value in resnets.items()}
