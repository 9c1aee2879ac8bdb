#!/usr/bin/env python
"""Pretrain a ResNet with MoCo v1 or v2, end-to-end or with a memory bank, on unlabelled images.

    python pretrain/main.py DATA --recipe configs/pretrain/moco_v2_r50.yaml
    torchrun --nproc_per_node 8 pretrain/main.py DATA --recipe configs/pretrain/moco_v2_r50.yaml

Flags are those of facebookresearch/moco's main_moco.py, with a few more.
"""

from moco_det.common.ending import start_command

if __name__ == "__main__":
    start_command()  # before the imports that take seconds

import argparse

import torch

from pretrain.flags.launch import launch
from pretrain.flags.pretraining import parse_pretraining
from pretrain.run import train


def pretrain(args: argparse.Namespace, device: torch.device) -> None:
    """From images to a checkpoint, on `device`; one of the run's processes."""
    train(args, device)


if __name__ == "__main__":
    launch(pretrain, parse_pretraining)
