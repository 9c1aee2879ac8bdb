"""The name table against the converters it must agree with, and against names known by hand."""

import pytest
import torch
import torchvision

from moco_det.common.resnets import Architecture, infer_architecture
from moco_det.common.weight_layouts import name_map

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
