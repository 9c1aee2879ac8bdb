"""Conversion: the official converter's rule is the oracle, every fault is named."""

import copy
import os
import pickle
import re

import pytest
import torch
import torchvision
from foreign_checkpoints import moco_checkpoint, randomise

from moco_det.common.errors import UserError
from moco_det.common.resnets import Architecture
from moco_det.common.weight_sources import read_state_dict
from moco_det.native.modeling.backbones import ResNet
from moco_det.weights import conversion
from moco_det.weights.conversion import convert_file, feature_difference
from moco_det.weights.files import write_weights

STAGES = ["res2", "res3", "res4", "res5"]


def official_converter(state_dict):
    """facebookresearch/moco's detection/convert-pretrain-to-detectron2.py."""
    model = {}
    for name, value in state_dict.items():
        if not name.startswith("module.encoder_q."):
            continue
        name = name.replace("module.encoder_q.", "")
        if "layer" not in name:
            name = "stem." + name
        for t in (1, 2, 3, 4):
            name = name.replace(f"layer{t}", f"res{t + 1}")
        for t in (1, 2, 3):
            name = name.replace(f"bn{t}", f"conv{t}.norm")
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        model[name] = value.numpy()
    return {"model": model, "__author__": "MOCO", "matching_heuristics": True}


def native_backbone(architecture: Architecture, stride_in_1x1=False):
    return ResNet(
        architecture.depth,
        out_features=STAGES,
        norm="BN",
        freeze_at=0,
        stride_in_1x1=stride_in_1x1,
        groups=architecture.groups,
        width_per_group=architecture.width_per_group,
        stem_channels=architecture.stem_channels,
        res2_channels=architecture.res2_channels,
    )


def convert(source, out, to="detectron2", build=native_backbone):
    return convert_file(source, out, to, build)


@pytest.fixture
def checkpoint(tmp_path):
    """Function: checkpoint content -> path of a file that holds it."""

    def write(content, name="checkpoint.pth.tar"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize("mlp", [False, True])
def test_equals_the_official_converter(tmp_path, checkpoint, mlp):
    content = moco_checkpoint(mlp=mlp)
    conversion = convert(checkpoint(content), tmp_path / "ours.pkl")
    ours = pickle.loads((tmp_path / "ours.pkl").read_bytes())
    official = official_converter(content["state_dict"])
    heads = {name for name in official["model"] if name.startswith("stem.fc.")}
    assert len(heads) == (4 if mlp else 2)
    assert ours["model"].keys() == official["model"].keys() - heads
    for name, array in ours["model"].items():
        assert array.dtype == official["model"][name].dtype
        assert (array == official["model"][name]).all(), name
    assert {k: ours[k] for k in official if k != "model"} == {
        k: v for k, v in official.items() if k != "model"
    }
    assert ours["requires"] == Architecture(18).config()
    assert conversion.difference <= 1e-5


def test_every_key_is_mapped_or_dropped_by_name(tmp_path, checkpoint):
    content = moco_checkpoint()
    state = content["state_dict"]
    state["module.queue_backbone"] = torch.zeros(512, 8)  # of kNN-MoCo
    conversion = convert(checkpoint(content), tmp_path / "w.pkl")
    assert set(conversion.names) | set(conversion.source.dropped) == set(state)
    dropped = {re.sub(r"encoder_k\..*", "encoder_k", name) for name in conversion.source.dropped}
    heads = {f"module.encoder_q.fc.{kind}" for kind in ("weight", "bias")}
    queues = {"module.queue", "module.queue_ptr", "module.queue_backbone"}
    assert dropped == heads | queues | {"module.encoder_k"}
    every = conversion.describe(verbose=True).splitlines()
    assert "  module.encoder_q.layer1.0.bn1.bias -> res2.0.conv1.norm.bias" in every
    assert "  module.queue_ptr" in every
    assert len(every) == len(state) + 4


def test_checkpoint_without_module_prefix(tmp_path, checkpoint):
    content = moco_checkpoint()
    state = content["state_dict"]
    content["state_dict"] = {k.removeprefix("module."): v for k, v in state.items()}
    convert(checkpoint(content), tmp_path / "bare.pth")
    convert(checkpoint(moco_checkpoint()), tmp_path / "w.pth")
    assert torch.load(tmp_path / "bare.pth")["model"].keys() == (
        torch.load(tmp_path / "w.pth")["model"].keys()
    )


def test_round_trip_of_an_official_checkpoint(tmp_path, checkpoint):
    content = moco_checkpoint()
    convert(checkpoint(content), tmp_path / "w.pkl")
    convert(tmp_path / "w.pkl", tmp_path / "back.pth", to="torchvision")
    back = torch.load(tmp_path / "back.pth")
    prefix = "module.encoder_q."
    encoder = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if prefix in k}
    assert back.keys() == {name for name in encoder if not name.startswith("fc.")}
    assert all(torch.equal(back[name], encoder[name]) for name in back)
    keys = torchvision.models.resnet18().load_state_dict(back, strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"]
    assert keys.unexpected_keys == []


def test_file_of_the_official_converter_goes_back_to_torchvision(tmp_path):
    (tmp_path / "w.pkl").write_bytes(
        pickle.dumps(official_converter(moco_checkpoint()["state_dict"]))
    )
    conversion = convert(tmp_path / "w.pkl", tmp_path / "back.pth", to="torchvision")
    assert conversion.source.dropped == ("stem.fc.weight", "stem.fc.bias")


def test_moco_checkpoint_to_torchvision(tmp_path, checkpoint):
    convert(checkpoint(moco_checkpoint()), tmp_path / "encoder.pth", to="torchvision")
    expected = randomise(torchvision.models.resnet18(num_classes=8)).state_dict()
    got = torch.load(tmp_path / "encoder.pth")
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_torchvision_state_dict_older_than_the_batch_counter(tmp_path, checkpoint):
    state = randomise(torchvision.models.resnet18()).state_dict()
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    conversion = convert(checkpoint(old, "resnet18.pth"), tmp_path / "w.pkl")
    assert conversion.source.dropped == ("fc.weight", "fc.bias")
    assert len(conversion.names) == len(old) - 2
    content = pickle.loads((tmp_path / "w.pkl").read_bytes())
    assert content["__author__"] == "torchvision"


@pytest.mark.parametrize("c4", [False, True])
def test_backbone_of_a_detector_goes_back_to_torchvision(tmp_path, c4):
    backbone = randomise(native_backbone(Architecture(18)))
    model = {}
    for name, value in backbone.state_dict().items():
        head = c4 and name.startswith("res5.")
        prefix = "roi_heads." if head else "backbone." if c4 else "backbone.bottom_up."
        model[prefix + name] = value
    heads = {"proposal_generator.rpn_head.conv.weight": torch.ones(1), "pixel_mean": torch.ones(3)}
    heads["roi_heads.box_predictor.cls_score.weight"] = torch.ones(1)
    new = ["roi_heads.res5.norm.weight"]
    if not c4:  # an FPN's layers, and those of a dilated C5
        new = ["backbone.fpn_lateral2.weight", "backbone.reduce.norm.running_mean"]
    heads |= {name: torch.ones(1) for name in new}
    write_weights(tmp_path / "model_final.pth", {"model": model | heads, "iteration": 9})
    conversion = convert(tmp_path / "model_final.pth", tmp_path / "back.pth", to="torchvision")
    assert set(conversion.source.dropped) == set(heads)
    network = torchvision.models.resnet18()
    network.load_state_dict(torch.load(tmp_path / "back.pth"), strict=False)
    assert feature_difference(network, backbone) <= 1e-5


@pytest.mark.parametrize("arch", ["resnet50", "resnext50_32x4d"])
def test_bottleneck_networks(tmp_path, checkpoint, arch):
    state = randomise(torchvision.models.get_model(arch)).state_dict()
    path = checkpoint(state, f"{arch}.pth")
    conversion = convert(path, tmp_path / "w.pkl")
    assert conversion.difference <= 1e-5
    os.remove(tmp_path / "w.pkl")

    def wrong(architecture):
        return native_backbone(architecture, stride_in_1x1=True)

    # Same names, same shapes: only the features tell that the stride is in the wrong place.
    with pytest.raises(UserError, match="features differ by .*was not written"):
        convert(path, tmp_path / "w.pkl", build=wrong)
    assert os.listdir(tmp_path) == [path.name]


def test_feature_difference_is_the_largest_of_all_stages():
    class Constant(torch.nn.Module):
        def __init__(self, **values):
            super().__init__()
            self.values = {stage: torch.zeros(1, 2, 2, 2) for stage in STAGES}
            for stage, value in values.items():
                self.values[stage][0, 1, 1, 0] = value

        def forward(self, image):
            return self.values

    assert feature_difference(Constant(), Constant(res3=-0.5, res5=0.25)) == 0.5
    difference = feature_difference(Constant(res2=1.0), Constant(res4=float("nan")))
    assert not difference <= 1e-5  # not a number is no agreement


def test_faulty_file_is_named_and_nothing_written(tmp_path, checkpoint):
    state = torchvision.models.resnet18().state_dict()
    del state["layer4.1.conv2.weight"]
    path = checkpoint(state, "resnet18.pth")
    with pytest.raises(UserError, match=r"resnet18\.pth: not a whole ResNet-18: layer4\.1\.conv2"):
        convert(path, tmp_path / "w.pkl")
    assert os.listdir(tmp_path) == [path.name]


def test_impossible_requests(tmp_path, checkpoint):
    path = checkpoint(randomise(torchvision.models.resnet18()).state_dict(), "resnet18.pth")
    with pytest.raises(UserError, match=r"w\.onnx: a file for detectron2 ends in \.pkl or \.pth"):
        convert(path, tmp_path / "w.onnx")
    with pytest.raises(UserError, match="would replace the file it is made from"):
        convert(path, path)
    with pytest.raises(UserError, match="already a torchvision state_dict"):
        convert(path, tmp_path / "w.pth", to="torchvision")
    caffe2 = {"model": {"conv1_w": torch.ones(64, 3, 7, 7)}, "__author__": "Caffe2"}
    write_weights(tmp_path / "R-50.pkl", caffe2)
    with pytest.raises(UserError, match="Caffe2 file"):
        convert(tmp_path / "R-50.pkl", tmp_path / "w.pth", to="torchvision")


@pytest.mark.parametrize(("arch", "suffix"), [("resnet50", "pkl"), ("resnet18", "pth")])
def test_detectron2_loads_the_file(tmp_path, checkpoint, arch, suffix):
    """Detectron2's own loader and network give the source's features, where it is installed."""
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import build_resnet_backbone

    network = randomise(torchvision.models.get_model(arch))
    out = tmp_path / f"w.{suffix}"
    config = convert(checkpoint(network.state_dict(), "in.pth"), out).source.architecture.config()
    cfg = get_cfg()
    cfg.merge_from_list([item for pair in config.items() for item in pair])
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = STAGES
    detector = torch.nn.Module()
    detector.backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    rest = DetectionCheckpointer(detector).load(str(out))
    assert rest["requires"] == config  # tolerated and handed back
    assert feature_difference(network, detector.backbone) <= 1e-5
    assert read_state_dict(out)[0].keys() == detector.backbone.state_dict().keys()


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("_orig_mod.encoder_q.", "'_orig_mod.' from 1"),
        ("module._orig_mod.encoder_q.", "'module._orig_mod.' from 1"),
        ("model.encoder_q.", "'model.' from 1"),
        ("model.", "'model.' from 1"),
        ("backbone.", "'backbone.' from 1"),
        ("model.backbone.", "'model.backbone.' from 1"),
        ("module.encoder_q.", ""),
        ("module.", ""),
    ],
)
def test_prefixes_that_occur_in_life(tmp_path, prefix, said):
    encoder = torchvision.models.resnet18().state_dict()
    state = {f"{prefix}{k}": v for k, v in encoder.items() if not k.startswith("fc.")}
    if "backbone" in prefix:
        state["projection_head.0.weight"] = torch.ones(1)
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    done = convert(tmp_path / "a.ckpt", tmp_path / "w.pkl")
    found = read_state_dict(tmp_path / "w.pkl")[0]
    assert torch.equal(found["stem.conv1.weight"], encoder["conv1.weight"])
    assert (f"stripped {said}" in done.describe()) if said else "stripped" not in done.describe()
    del state[f"{prefix}layer4.1.conv2.weight"]
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"layer4\.1\.conv2\.weight is missing"):
        convert(tmp_path / "a.ckpt", tmp_path / "w.pkl")


@pytest.mark.parametrize(
    ("difference", "same"), [(0.0, True), (1e-5, True), (1.1e-5, False), (float("nan"), False)]
)
def test_what_changes_the_features_is_not_written(
    tmp_path, checkpoint, monkeypatch, difference, same
):
    monkeypatch.setattr(conversion, "feature_difference", lambda before, after: difference)
    out = tmp_path / "w.pkl"
    if same:
        assert convert(checkpoint(moco_checkpoint()), out).difference == difference
    else:
        with pytest.raises(UserError, match="features differ by .*w.pkl was not written"):
            convert(checkpoint(moco_checkpoint()), out)
    assert out.exists() is same


@pytest.mark.parametrize("name", ["bn1.running_mean", "layer2.0.bn1.running_var", "conv1.weight"])
def test_features_are_compared_in_evaluation_mode(name):
    """In training mode batch statistics would hide running ones that were mistaken."""
    first = randomise(torchvision.models.resnet18()).train()
    second = copy.deepcopy(first)
    assert feature_difference(first, second) == 0
    with torch.no_grad():
        second.state_dict()[name].mul_(1.5)
    assert feature_difference(first, second) > 1e-3
    assert not first.training
    assert not second.training
