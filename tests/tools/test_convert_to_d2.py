"""The command: what it prints, what it leaves, how it fails."""

import pickle

import pytest
import torch
import torchvision
from commands import load_command, python, run
from float64 import ROUNDING
from foreign_checkpoints import RECORDED, arrays_of, checkpoint_of
from torchvision.models.feature_extraction import create_feature_extractor

from moco_det.common.resnets import infer_architecture
from moco_det.common.weight_layouts import rename
from pretrain.moco.encoders import build_encoder

ENCODERS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
ENCODERS += ["resnext50_32x8d", "resnet50w2x", "resnet50w4x"]
# One of each kind: the wide ones take gigabytes, a narrow one is built in the same way.
COMPUTED = ["resnet18", "resnet50", "resnext50_32x8d", "resnet50w0.25x"]
TOOL = "tools/convert_to_d2.py"
STAGES = ["res2", "res3", "res4", "res5"]


def write_checkpoint(path, network):
    state = {f"module.encoder_q.{k}": v for k, v in network.state_dict().items()}
    state["module.queue"] = torch.zeros(8, 16)
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": state, "optimizer": {}}, path)


def test_converts_and_reports(tmp_path):
    write_checkpoint(tmp_path / "checkpoint_last.pth.tar", torchvision.models.resnet18())
    done = python(TOOL, tmp_path / "checkpoint_last.pth.tar", tmp_path / "weights.pkl")
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


def randomised(arch: str) -> torch.nn.Module:
    torch.manual_seed(0)
    network = torchvision.models.get_model(arch)
    for value in network.state_dict().values():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5)
    return network.eval()


def same_features(ours: torch.nn.Module, expected: torch.nn.Module) -> bool:
    """Of the last stage, before the pooling, where ours is timm's or torchvision's."""
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = []
    for network in (ours, expected):
        network.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
        with torch.no_grad():
            network.eval()(image)
    return torch.allclose(*seen, atol=1e-5 * seen[1].abs().max())


def convert_foreign(folder, target: str, out: str, name="SimSiam"):
    """Its network, and what the command printed."""
    network = randomised("resnet18")
    content = checkpoint_of(name, network)
    torch.save({**content, "arch": "resnet18"}, folder / "a.pth")
    done = run(TOOL, folder / "a.pth", folder / out, "--to", target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{RECORDED[name]['title']}, ResNet-18"
    return network, done.stdout


@pytest.mark.parametrize("out", ["w.safetensors", "w.pth"])
def test_timm_loads_what_was_written_for_it(tmp_path, out):
    timm = pytest.importorskip("timm")
    network, _ = convert_foreign(tmp_path, "timm", out)
    path = str(tmp_path / out)
    loaded = timm.create_model("resnet18", num_classes=0, checkpoint_path=path)  # strictly
    assert same_features(loaded, network)


@pytest.mark.parametrize("target", ["torchvision", "safetensors"])
def test_torchvision_loads_what_was_written_for_it(tmp_path, target):
    out = tmp_path / {"torchvision": "w.pth", "safetensors": "w.safetensors"}[target]
    if target == "safetensors":
        load = pytest.importorskip("safetensors.torch").load_file
    else:
        load = torch.load
    network, printed = convert_foreign(tmp_path, target, out.name, "lightly MoCo")
    assert f"{target} needs:\n  images: RGB in [0, 1]\n  mean: [0.485, " in printed
    loaded = torchvision.models.resnet18()
    keys = loaded.load_state_dict(load(out), strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    assert same_features(loaded, network)


def test_for_mmdetection(tmp_path):
    """mmengine's Pretrained takes a state_dict under torchvision's names into a backbone."""
    network, printed = convert_foreign(tmp_path, "mmdetection", "w.pth", "DenseCL")
    assert "  backbone.style: 'pytorch'" in printed
    assert "  data_preprocessor.bgr_to_rgb: True" in printed
    content = torch.load(tmp_path / "w.pth")
    assert content["author"] == "DenseCL"
    assert content["state_dict"].keys() == arrays_of(network).keys()
    assert all(torch.equal(content["state_dict"][k], v) for k, v in arrays_of(network).items())


def test_a_file_of_timm_goes_to_detectron2(tmp_path):
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18")
    save = pytest.importorskip("safetensors.torch").save_file
    save(network.state_dict(), tmp_path / "model.safetensors")
    done = run(TOOL, tmp_path / "model.safetensors", tmp_path / "w.pkl")
    assert done.returncode == 0, done.stderr
    content = pickle.loads((tmp_path / "w.pkl").read_bytes())["model"]
    assert (content["stem.conv1.weight"] == network.conv1.weight.detach().numpy()).all()
    deep = timm.create_model("resnet18d").state_dict()  # another stem
    save(deep, tmp_path / "model.safetensors")
    done = run(TOOL, tmp_path / "model.safetensors", tmp_path / "d.pkl")
    assert done.returncode == 1
    assert "unexpected keys in a torchvision state_dict: conv1.0.weight" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.pth", "w.pth", "--to", "safetensors"], "a file for safetensors ends in .safetensors"),
        (["a.pth", "w.safetensors"], "a file for detectron2 ends in .pkl or .pth"),
        (["moco_v2_200ep", "w.pkl"], "moco_v2_200ep_pretrain.pth.tar, or name the local file"),
        (["https://127.0.0.1:9/w.pth", "w.pkl"], "fetch https://127.0.0.1:9/w.pth by other means"),
        (["torchvision://resnet5", "w.pkl"], "torchvision has no such network"),
    ],
)
def test_bad_sources_and_targets_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network, whatever the machine
    (tmp_path / "a.pth").write_bytes(b"")
    done = run(TOOL, arguments[0], tmp_path / arguments[1], *arguments[2:])
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stderr


def test_failure_is_one_line_and_leaves_no_file(tmp_path):
    network = torchvision.models.resnet18()
    network.conv1 = torch.nn.Conv2d(3, 64, 3, bias=False)
    write_checkpoint(tmp_path / "small.pth.tar", network)
    done = run(TOOL, tmp_path / "small.pth.tar", tmp_path / "weights.pkl")
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
def test_every_encoder_of_the_paper_fits_the_native_engine(arch):
    architecture, converted = pretrained_shapes(arch)
    with torch.device("meta"):
        assert shapes(load_command(TOOL).build_backbone(architecture).state_dict()) == converted


def detectron2_backbone(architecture):
    """Under the config that the converted file asks for; skips without Detectron2."""
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import build_resnet_backbone

    cfg = get_cfg()
    cfg.merge_from_list([item for pair in architecture.config().items() for item in pair])
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = STAGES
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize("arch", ENCODERS)
def test_every_encoder_of_the_paper_fits_detectron2(arch):
    architecture, converted = pretrained_shapes(arch)
    with torch.device("meta"):
        assert shapes(detectron2_backbone(architecture).state_dict()) == converted


@pytest.mark.parametrize("arch", COMPUTED)
@pytest.mark.parametrize("engine", ["native", "detectron2"])
def test_features_are_those_of_the_encoder(arch, engine):
    """On small inputs, in each stage: relative to the largest, since random networks grow."""
    torch.manual_seed(0)
    encoder = build_encoder(arch, dim=8)
    for name, value in encoder.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith("fc.")}
    build = load_command(TOOL).build_backbone if engine == "native" else detectron2_backbone
    backbone = build(infer_architecture(state))
    backbone.load_state_dict(rename(state, "torchvision", "detectron2"))
    encoder, backbone = encoder.double(), backbone.double()
    layers = {f"layer{s}": f"res{s + 1}" for s in (1, 2, 3, 4)}
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.inference_mode():
        wanted = create_feature_extractor(encoder.eval(), layers)(image)
        found = backbone.eval()(image)
    for stage in STAGES:
        difference = (found[stage] - wanted[stage]).abs().max() / wanted[stage].abs().max()
        assert difference < ROUNDING, stage


def test_a_narrow_resnet_18_has_no_shape_in_detectron2(tmp_path):
    """Its RES2_OUT_CHANNELS is 64 for basic blocks, whatever the config says."""
    write_checkpoint(tmp_path / "narrow.pth.tar", build_encoder("resnet18w0.25x", dim=8))
    done = run(TOOL, tmp_path / "narrow.pth.tar", tmp_path / "weights.pkl")
    assert done.returncode == 1
    assert "not a whole ResNet-18: " in done.stderr
    assert "conv1.weight has the shape (16, 3, 7, 7), not (64, 3, 7, 7)" in done.stderr
    assert not (tmp_path / "weights.pkl").exists()
