"""Checkpoints as others write them, from the names that were recorded of their public code."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml
from paths import REPOSITORY
from torch import nn
from torchvision.models.resnet import ResNet

RECORDED: dict[str, dict[str, Any]] = yaml.safe_load(
    (REPOSITORY / "tests/golden/weight_layouts.yaml").read_text()
)["layouts"]

COUNTS = ("num_batches_tracked", "steps", "queue_ptr", "queue2_ptr", "pointer")
BESIDE = {  # values of other entries than numbers
    "arch": "resnet18w0.25x",
    "args": argparse.Namespace(lr=0.1, output_dir=Path("output")),
    "opt": argparse.Namespace(lr=0.1),
    "author": "somebody",
    "student": {"module.backbone.conv1.weight": torch.zeros(1, 3)},
    "target_network_state_dict": {"encoder.0.weight": torch.zeros(1, 3)},
    "model_ema": {"module.conv1.weight": torch.zeros(1, 3)},
    "hyper_parameters": {"lr": 0.1},
    "meta": {"epoch": 1, "CLASSES": None},
}


def arrays_of(encoder: ResNet) -> dict[str, torch.Tensor]:
    """Without its classifier."""
    return {name: value for name, value in encoder.state_dict().items() if name[:3] != "fc."}


def numbered(encoder: ResNet) -> nn.Sequential:
    """The network of those who number the children of torchvision's."""
    return nn.Sequential(*list(encoder.children())[:-1])


def state_of(name: str, encoder: ResNet) -> dict[str, torch.Tensor]:
    """All arrays of the checkpoint `name`; the ResNets that are not to be taken are of ones."""
    recorded = RECORDED[name]
    arrays = {"named": arrays_of(encoder), "numbered": numbered(encoder).state_dict()}
    state = {}
    for prefix, kind in recorded["resnets"].items():
        for inner, value in arrays[kind].items():
            other = value.new_ones(()).expand(value.shape)  # takes no room in the file
            state[prefix + inner] = value if prefix == recorded["taken"] else other
    for module, lasts in recorded["others"].items():
        for last in lasts.split():
            value = torch.arange(4) if last == "queue_y" else torch.ones(2)
            value = torch.tensor(7) if last in COUNTS else value
            state[f"{module}.{last}".removeprefix(".")] = value
    return state


def checkpoint_of(name: str, encoder: ResNet) -> Mapping[str, Any]:
    """What the file holds."""
    recorded = RECORDED[name]
    content: dict[str, Any] = state_of(name, encoder)
    for key in reversed(recorded["entry"]):
        content = {key: content}
    return content | {key: BESIDE.get(key, 3) for key in recorded["beside"] if key not in content}


def write_foreign(path: Path, name: str, encoder: ResNet) -> Path:
    torch.save(checkpoint_of(name, encoder), path)
    return path


# -- MoCo's own, by hand --------------------------------------------------------------------------


def randomise(network, seed=0):
    """Weights and statistics such that no two arrays of a network can be exchanged unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.fill_(11)
        elif value.dim() == 1:
            value.uniform_(0.5, 1.5, generator=generator)
        else:
            value.normal_(std=value[0].numel() ** -0.5, generator=generator)
    return network


def moco_checkpoint(arch="resnet18", mlp=False, **changes):
    """A checkpoint with the names of facebookresearch/moco: DistributedDataParallel(MoCo)."""
    encoder = randomise(torchvision.models.get_model(arch, num_classes=8))
    if mlp:
        width = encoder.fc.in_features
        encoder.fc = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), encoder.fc)
    state = {}
    for name, value in encoder.state_dict().items():
        state[f"module.encoder_q.{name}"] = value
        state[f"module.encoder_k.{name}"] = value.new_zeros(()).expand(value.shape)  # a small file
    state |= {"module.queue": torch.ones(8, 16), "module.queue_ptr": torch.zeros(1).long()}
    return {"epoch": 200, "arch": arch, "state_dict": state, "optimizer": {}} | changes
