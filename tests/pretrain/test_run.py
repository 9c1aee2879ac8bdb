"""`pretrain(...)` from Python: the run of the command, and backbones of any kind."""

import copy
import inspect
import subprocess
import sys

import cv2
import numpy as np
import pytest
import timm
import torch
import torchvision
from pretraining_runs import checkpoint, values
from same_bits import assert_same_bits
from torch import nn

from moco_det.common.errors import UserError
from moco_det.common.weight_sources import read_state_dict
from moco_det.weights.resnet import find_resnet
from pretrain import add_head, pretrain
from pretrain.data.images import Loading
from pretrain.evaluation.embedding import embed
from pretrain.evaluation.features import load_encoder, pooled
from pretrain.flags.pretraining import LAUNCH, parse_pretraining, pretraining_parser
from pretrain.main import pretrain as run_command
from pretrain.moco.encoders import BackboneWithHead, build_encoder

CPU = torch.device("cpu")
TINY = {"image_size": 32, "batch_size": 8, "moco_k": 16, "moco_dim": 8, "epochs": 1, "workers": 0,
        "seed": 3, "lr": 0.003, "mlp": True, "knn_every": 0, "log": "none"}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 9), ("val", 2)):
        for label in "ab":
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (36, 36, 3)).astype(np.uint8)
                cv2.imwrite(str(root / part / label / f"{i}.png"), pixels)
    return root


def test_it_is_the_command(images, tmp_path):
    """The same flags give the same bits, files and numbers."""
    flags = "-a resnet18w0.25x --image-size 32 -b 8 --moco-k 16 --moco-dim 8 --epochs 1 -j 0 "
    flags += "--seed 3 --lr 0.003 --mlp --knn-every 1 --schedule 1 2 --log none --no-cos --output"
    run_command(parse_pretraining([str(images), *flags.split(), str(tmp_path / "command")]), CPU)
    run = pretrain(
        images, **TINY | {"knn_every": 1}, arch="resnet18w0.25x", schedule=(1, 2), cos=False,
        output=tmp_path / "python", recipe=None, overwrite=False,
    )  # fmt: skip
    ours, theirs = (checkpoint(tmp_path / name) for name in ("python", "command"))
    assert ours.pop("config") | {"output": None} == theirs.pop("config") | {"output": None}
    assert_same_bits(ours, theirs)
    assert run.checkpoint == tmp_path / "python" / "checkpoint_last.pth.tar"
    assert run.metrics["loss"] == values(tmp_path / "command", "loss")[-1]
    assert run.metrics["knn_top1"] == values(tmp_path / "command", "knn_top1")[-1]


def test_the_signature_has_every_flag_with_its_default(images):
    parameters = dict(inspect.signature(pretrain).parameters)
    assert list(parameters)[:3] == ["data", "backbone", "device"]
    defaults = vars(parse_pretraining([str(images)]))
    assert parameters.keys() - {"backbone", "device"} == defaults.keys() - LAUNCH
    for name in parameters.keys() - {"data", "backbone", "device"}:
        assert parameters[name].default == defaults[name], name
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert {action.dest for action in pretraining_parser()._actions} >= LAUNCH


def test_importing_the_package_is_cheap():
    code = "import sys, pretrain; sys.exit('torch' in sys.modules or pretrain.__all__ == [])"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- any backbone ---------------------------------------------------------------------------------


class Viewing(nn.Module):
    """As networks were written before `flatten`; its BN keeps no running statistics."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, 8), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, images):
        return self.bn(self.conv(images)).view(len(images), -1)


def torchvision_resnet():
    network = build_encoder("resnet18w0.25x")
    network.fc = nn.Identity()
    return network


# What makes it, width of its features, and the prefix of its arrays in a checkpoint.
BACKBONES = {
    "vision transformer": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=32, num_classes=0, depth=1, embed_dim=12, num_heads=2
        ),
        12,
        "backbone.",
    ),
    "activations in its BN": (
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=0),
        1024,
        "backbone.",
    ),
    "a classifier's logits": (
        lambda: torchvision.models.squeezenet1_1(num_classes=20),
        20,
        "backbone.",
    ),
    "a ResNet without fc": (torchvision_resnet, 128, ""),
    "view": (Viewing, 64, "backbone."),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_is_trained(images, tmp_path, name):
    make, width, prefix = BACKBONES[name]
    torch.manual_seed(0)
    backbone = make()
    before = copy.deepcopy(backbone.state_dict())
    run = pretrain(images, backbone, **TINY, output=tmp_path)
    after = backbone.state_dict()  # it is trained itself
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[key], before[key]) for key in after)
    saved = checkpoint(tmp_path)["state_dict"]
    start = f"module.encoder_q.{prefix}"
    assert {k.removeprefix(start): v for k, v in saved.items() if k.startswith(start)}.keys() >= (
        after.keys()
    )
    for key, value in after.items():
        assert torch.equal(saved[start + key], value), key
    assert saved["module.encoder_q.fc.0.weight"].shape == (width, width)
    assert saved["module.encoder_q.fc.2.weight"].shape == (8, width)
    pixels = torch.randn(3, 3, 32, 32)  # no multiple of the run's BN groups
    assert not run.backbone.training
    torch.testing.assert_close(run.backbone(pixels), backbone(pixels))
    assert run.backbone(pixels).shape == (3, width)
    assert np.isfinite(run.metrics["loss"])


def test_a_run_of_a_backbone_resumes_to_the_same_bits(images, tmp_path):
    for name, parts in (("whole", [2]), ("parts", [1, 2])):
        for epochs in parts:
            torch.manual_seed(0)
            flags = TINY | {"epochs": epochs, "knn_every": 2, "output": tmp_path / name}
            run = pretrain(images, Viewing(), **flags, resume="auto")
    parts, whole = (checkpoint(tmp_path / name) for name in ("parts", "whole"))
    assert parts.pop("config") | {"output": None} == whole.pop("config") | {"output": None}
    assert_same_bits(parts, whole)
    assert run.metrics["knn_top1"] == values(tmp_path / "whole", "knn_top1")[-1]
    again = pretrain(images, Viewing(), **flags, resume="auto")  # nothing is left to do
    assert again.metrics == run.metrics
    with pytest.raises(UserError, match="Viewing, not a resnet18w0.25x: resume it by pretrain.pre"):
        pretrain(images, arch="resnet18w0.25x", **flags, resume="auto")


def test_what_commands_make_of_such_checkpoints(images, tmp_path):
    """A ResNet of a shape that they know is one; of others they say what it is."""
    resnet, backbone = torchvision_resnet(), BACKBONES["activations in its BN"][0]()
    for name, network in (("known", resnet), ("other", backbone)):
        pretrain(images, network, **TINY, output=tmp_path / name)
    known, other = (str(tmp_path / name / "checkpoint_last.pth.tar") for name in ("known", "other"))
    encoder = load_encoder(known, "resnet18w0.25x", 1)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(pooled(encoder)(pixels), resnet(pixels))
    said = "a timm.models.mobilenetv3.MobileNetV3, and only a program with that network can load it"
    for read in (
        lambda: load_encoder(other, "resnet18", 1),
        lambda: find_resnet(*read_state_dict(other)),
    ):
        with pytest.raises(UserError, match=said):
            read()


def test_features_of_any_backbone_can_be_embedded(images, tmp_path):
    run = pretrain(images, Viewing(), **TINY, output=tmp_path)
    found = embed(run.backbone, str(images), 32, Loading(8, 0, 0, False, 0.0), CPU)
    assert found.features.shape == (22, 64)


class Answer(nn.Module):
    """Gives whatever a function makes of the images; in training that of another one."""

    def __init__(self, function, in_training=None):
        super().__init__()
        self.function, self.in_training = function, in_training or function
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return (self.in_training if self.training else self.function)(images)


FLAT = nn.Flatten()


@pytest.mark.parametrize(
    ("backbone", "flags", "message"),
    [
        (Answer(lambda x: (FLAT(x), x)), {}, "gives a tuple: features must be a tensor N x C"),
        (Answer(lambda x: x), {}, "gives 2 x 3 x 32 x 32 for 2 images: .*num_classes=0"),
        (Answer(lambda x: FLAT(x)[:1]), {}, "gives 1 x 3072 for 2 images"),
        (Answer(FLAT, lambda x: (x, x)), {}, "gives a tuple"),  # such as GoogLeNet
        (Answer(lambda x: x @ x[:, :1, :5]), {}, "does not take images of 2 x 3 x 32 x 32: "),
        (nn.Sequential(nn.SyncBatchNorm(3), FLAT), {}, "the backbone has SyncBatchNorm"),
        (nn.Sequential(nn.Conv2d(3, 4, 32, device="meta"), FLAT), {}, "on the device meta"),
        (torch.jit.script(nn.Sequential(FLAT)), {}, "the backbone is TorchScript"),
        ("resnet18", {}, "the backbone is a str, not a torch.nn.Module"),
        (Answer(FLAT), {"arch": "resnet18"}, "arch is for networks that are known by a name"),
        (Answer(FLAT), {"small_stem": True}, "small_stem is for networks"),
        (None, {"moko_k": 4}, "unknown argument moko_k; did you mean moco_k?"),
        (None, {"moco_k": "many"}, "argument --moco-k: invalid int value: 'many'"),
        (None, {"moco_k": 0}, "--moco-k must be at least 1"),
        (None, {"epochs": [1, 2]}, r"--epochs is \[1, 2\]: it takes one value"),
        (None, {"small_scale": (0.1, 0.2, 0.3)}, "--small-scale is .*: it takes 2 values"),
        (None, {"device": "tpu9"}, "device tpu9 cannot be used: .*tpu9"),
        (None, {"mlp": 1}, "--mlp is 1: it takes True or False"),
        (None, {"mechanism": "moko"}, "argument --mechanism: invalid choice: 'moko'"),
        (None, {"gpu": 1}, "unknown argument gpu; torchrun starts the processes of gpu"),
    ],
)  # fmt: skip
def test_bad_input_is_named_before_anything_is_deleted(images, tmp_path, backbone, flags, message):
    (tmp_path / "checkpoint_last.pth.tar").write_text("of another run")
    with pytest.raises(UserError, match=message) as raised:
        pretrain(images, backbone, **TINY | {"output": tmp_path, "overwrite": True} | flags)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "checkpoint_last.pth.tar").read_text() == "of another run"


def test_a_head_leaves_the_backbone_as_it_was():
    backbone = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten()).train()
    before, draws = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    torch.manual_seed(1)
    encoder = add_head(backbone, dim=5, mlp=False, image_size=4)
    torch.manual_seed(1)
    expected = nn.Linear(48, 5)  # the dry run takes no draw
    assert isinstance(encoder, BackboneWithHead)
    assert torch.equal(encoder.fc.weight, expected.weight)
    assert all(torch.equal(backbone.state_dict()[key], value) for key, value in before.items())
    assert all(module.training for module in backbone.modules())
    assert draws.shape == torch.get_rng_state().shape


def test_what_has_no_part_in_the_features_gets_no_gradient(capsys):
    """Several processes would wait for it; gradients that are there stay."""
    backbone = Answer(lambda images: backbone.used(images).flatten(1))
    backbone.used = nn.Conv2d(3, 2, 4)
    backbone.used.weight.grad = torch.ones_like(backbone.used.weight)
    encoder = add_head(backbone, dim=5, mlp=True, image_size=4)
    asked = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert asked == {name for name, _ in encoder.named_parameters()} - {"backbone.weight"}
    assert capsys.readouterr().out.endswith("any part in the features: backbone.weight\n")
    assert (backbone.used.weight.grad == 1).all()
    assert encoder.fc[0].weight.grad is None
