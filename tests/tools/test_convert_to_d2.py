"""The command: what it prints, what it leaves, how it fails."""

import pickle
import runpy
import subprocess
import sys

import pytest
import torch
import torchvision

from moco_det.resnet_names import infer_architecture, rename
from pretrain.encoders import build_encoder

ENCODERS = ["resnet18", "resnet34", "resnet50", "resnet101"]
ENCODERS += ["resnext50_32x8d", "resnet50w2x", "resnet50w4x"]


def run(repository, *arguments):
    command = [sys.executable, repository / "tools" / "convert_to_d2.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def write_checkpoint(path, network):
    state = {f"module.encoder_q.{k}": v for k, v in network.state_dict().items()}
    state["module.queue"] = torch.zeros(8, 16)
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": state, "optimizer": {}}, path)


def test_converts_and_reports(repository, tmp_path):
    write_checkpoint(tmp_path / "checkpoint_last.pth.tar", torchvision.models.resnet18())
    done = run(repository, tmp_path / "checkpoint_last.pth.tar", tmp_path / "weights.pkl")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "MoCo checkpoint, ResNet-18"
    assert "120 keys mapped" in lines  # 20 convolutions and as many norms of 5 arrays
    assert "  module.encoder_q.layer1 -> res2: 24" in lines
    assert "3 keys dropped" in lines
    assert "  module.encoder_q.fc: 2" in lines
    (found,) = (line for line in lines if "difference" in line)
    assert float(found.split()[-1]) <= 1e-5
    assert "  INPUT.FORMAT: RGB" in lines
    content = pickle.loads((tmp_path / "weights.pkl").read_bytes())
    assert (content["__author__"], content["matching_heuristics"]) == ("MOCO", True)
    assert len(content["model"]) == 120


def test_failure_is_one_line_and_leaves_no_file(repository, tmp_path):
    network = torchvision.models.resnet18()
    network.conv1 = torch.nn.Conv2d(3, 64, 3, bias=False)
    write_checkpoint(tmp_path / "small.pth.tar", network)
    done = run(repository, tmp_path / "small.pth.tar", tmp_path / "weights.pkl")
    assert done.returncode == 1
    (line,) = (x for x in done.stderr.splitlines() if "Warning" not in x and "warn" not in x)
    assert line.startswith("error: ")
    assert "--small-stem" in line
    assert not (tmp_path / "weights.pkl").exists()


def shapes(state) -> dict:
    return {name: tuple(value.shape) for name, value in state.items()}


def pretrained_shapes(arch: str):
    """Architecture of an encoder of `pretrain`, and its arrays' shapes under Detectron2's names."""
    with torch.device("meta"):
        state = build_encoder(arch).state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    return infer_architecture(state), shapes(rename(state, "torchvision", "detectron2"))


@pytest.mark.parametrize("arch", ENCODERS)
def test_every_encoder_of_the_paper_fits_the_native_engine(repository, arch):
    tool = runpy.run_path(str(repository / "tools" / "convert_to_d2.py"))
    architecture, converted = pretrained_shapes(arch)
    with torch.device("meta"):
        assert shapes(tool["build_backbone"](architecture).state_dict()) == converted


@pytest.mark.parametrize("arch", ENCODERS)
def test_every_encoder_of_the_paper_fits_detectron2(arch):
    """Under the config that the converted file asks for, where Detectron2 is installed."""
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import build_resnet_backbone

    architecture, converted = pretrained_shapes(arch)
    cfg = get_cfg()
    cfg.merge_from_list([item for pair in architecture.config().items() for item in pair])
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    with torch.device("meta"):
        assert shapes(build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()) == converted
