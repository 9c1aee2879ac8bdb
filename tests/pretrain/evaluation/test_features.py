"""Features of whole splits against torchvision's, image by image; what a checkpoint gives."""

import numpy as np
import pytest
import torch
from devices import DEVICES
from foreign_checkpoints import RECORDED, arrays_of, write_foreign
from host_reads import HostReads
from mean_colour import Residual, views
from noisy_colours import slow_features, write_checkpoint, write_images
from torch import nn

from moco_det.common.errors import UserError
from moco_det.common.weight_layouts import rename
from pretrain.data.images import Loading
from pretrain.data.labelled import list_class_folders
from pretrain.evaluation import features as module
from pretrain.evaluation.features import (
    RANDOM,
    SplitFeatures,
    encode,
    extract_all,
    load_encoder,
    pixel_statistics,
    pooled,
)
from pretrain.moco.encoders import build_encoder

CPU = torch.device("cpu")


@pytest.fixture
def pretrained(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint.pth.tar")


def split_features(folder, max_unreadable) -> SplitFeatures:
    split = list_class_folders(folder, ["a", "b"])
    return SplitFeatures(split, 32, Loading(8, 0, 0, False, max_unreadable), CPU, None)


def test_features_of_a_split_are_torchvisions_without_the_unreadable(tmp_path, pretrained, capsys):
    folder = write_images(tmp_path) / "val"
    expected, labels = slow_features(pretrained, folder)
    (folder / "a" / "07.png").write_bytes(b"broken")
    expected, labels = np.delete(expected, 7, axis=0), np.delete(labels, 7)
    features, found = split_features(folder, max_unreadable=0.1).compute(
        pooled(load_encoder(str(pretrained), "resnet18", 2))
    )
    assert found.tolist() == labels.tolist()
    # The slow way decodes and crops by PIL alone: a level of 255 here and there.
    np.testing.assert_allclose(features, expected, atol=1e-3 * np.abs(expected).max())
    assert capsys.readouterr().out.count("07.png") == 1
    with pytest.raises(UserError, match=r"1 of 41 images are unreadable.*07\.png"):
        split_features(folder, max_unreadable=0.01).compute(nn.Flatten())


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.encoder_q.", "module._orig_mod.encoder_q.", "model.encoder_q.", "backbone.",
     "model.backbone.", "module.encoder_q.", "encoder_q."],
)  # fmt: skip
def test_prefixes_that_occur_in_life(tmp_path, prefix, capsys):
    """Of torch.compile, DataParallel and Lightning; the same encoder, or an array is named."""
    encoder = build_encoder("resnet18w0.25x", 8).state_dict()
    state = {f"{prefix}{name}": value for name, value in encoder.items() if name[:3] != "fc."}
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": state}, path)
    found = load_encoder(str(path), "resnet18w0.25x", 2).state_dict()
    assert all(torch.equal(found[name], encoder[name]) for name in found if name[:3] != "fc.")
    assert ("stripped" in capsys.readouterr().out) == (
        prefix not in ("module.encoder_q.", "encoder_q.")
    )
    del state[f"{prefix}layer4.1.conv2.weight"]
    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError, match=r"a.ckpt does not fit: .*layer4\.1\.conv2\.weight"):
        load_encoder(str(path), "resnet18w0.25x", 2)


@pytest.mark.parametrize("name", ["SimSiam", "lightly MoCo", "DINO", "OpenMMLab BYOL", "SwAV"])
def test_an_encoder_of_another_layout_is_the_same_encoder(tmp_path, name, capsys):
    encoder = build_encoder("resnet18w0.25x", 8)
    path = write_foreign(tmp_path / "a.pth", name, encoder)
    found = load_encoder(str(path), "resnet18w0.25x", 2)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(pooled(found)(image), pooled(encoder.eval())(image))
    assert f"{RECORDED[name]['title']}, ResNet-18" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet50", r"a\.pth holds a ResNet-18, not a resnet50: pass another -a"),
        ("resnet18", r"a\.pth does not fit: check -a resnet18 and --small-stem; .*\(16, 3, 7, 7\)"),
    ],
)
def test_another_architecture_is_said_so(tmp_path, arch, message):
    path = write_foreign(tmp_path / "a.pth", "VISSL", build_encoder("resnet18w0.25x", 8))
    with pytest.raises(UserError, match=message):
        load_encoder(str(path), arch, 2)


def test_a_file_of_detectron2_is_read_and_one_of_caffe2_is_not(tmp_path, capsys):
    encoder = build_encoder("resnet18w0.25x", 8)
    arrays = rename(arrays_of(encoder), "torchvision", "detectron2")
    torch.save({"model": arrays}, tmp_path / "d2.pth")
    found = load_encoder(str(tmp_path / "d2.pth"), "resnet18w0.25x", 2)
    assert torch.equal(found.layer4[0].conv1.weight, encoder.layer4[0].conv1.weight)
    assert "taken as trained on RGB" in capsys.readouterr().out
    torch.save({"conv1_w": torch.ones(64, 3, 7, 7)}, tmp_path / "R-50.pkl")
    with pytest.raises(UserError, match=r"R-50\.pkl is a Caffe2 file: .*BGR"):
        load_encoder(str(tmp_path / "R-50.pkl"), "resnet50", 2)


def test_encoding_normalises_by_imagenets_statistics():
    images = torch.full((1, 4, 4, 3), 124, dtype=torch.uint8)
    pixels = encode(nn.Identity(), images)
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        wanted = torch.full((4, 4), (124 / 255 - mean) / std)
        torch.testing.assert_close(pixels[0, channel], wanted)


def test_a_loaded_encoder_is_frozen_and_has_a_new_head(pretrained):
    encoder = load_encoder(str(pretrained), "resnet18", 5)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.fc.weight.shape == (5, 512)
    state = torch.load(pretrained, weights_only=True)["state_dict"]
    for name, value in encoder.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(value, state[f"module.encoder_q.{name}"]), name
    torch.manual_seed(1)
    untrained = load_encoder(RANDOM, "resnet18", 5)
    torch.manual_seed(1)
    again = build_encoder("resnet18", 5)
    assert torch.equal(untrained.conv1.weight, again.conv1.weight)


@pytest.mark.usefixtures("float64")
def test_pooled_features_are_those_below_the_head():
    encoder = build_encoder("resnet18", 8, mlp=True).eval()
    x = torch.randn(2, 3, 32, 32)
    seen = []
    encoder.fc.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    encoder(x)
    torch.testing.assert_close(pooled(encoder)(x), seen[0])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_of_processes_come_back_in_the_order_of_the_data(monkeypatch, processes):
    """Seven images: no whole number for each of two or three; every process gets all of them."""
    images = [(np.full((2, 2, 3), i, np.uint8), i) for i in range(7)]

    def red(pixels):
        return (pixels[:, :1, 0, 0] * 58.395 + 123.675).round()

    def of_process(rank, gather):
        for name, value in (("rank", rank), ("world_size", processes)):
            monkeypatch.setattr(module, name, lambda value=value: value)
        monkeypatch.setattr(module, "gather", gather)
        return extract_all(red, images, 0, CPU)

    shares = []
    for rank in range(processes):  # what each hands over: its features, and its labels
        own = []
        of_process(rank, lambda x, own=own: own.append(x) or torch.cat([x] * processes))
        shares.append(own)
    assert len({len(features) for features, _ in shares}) == 1
    for rank in range(processes):
        parts = iter(zip(*shares, strict=True))
        features, labels = of_process(rank, lambda x, parts=parts: torch.cat(next(parts)))
        assert labels.tolist() == features[:, 0].tolist() == list(range(7))


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_fine_tuning_sends_nothing_that_is_waited_for(device):
    network, images = Residual().to(device), views(4).to(device)
    encode(network, images)  # the pixels' mean and deviation are sent once
    with HostReads(device) as reads:
        encode(network, images).sum().backward()
    assert reads.names == []
    mean, _ = pixel_statistics(torch.device(device), torch.float32)
    assert mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
