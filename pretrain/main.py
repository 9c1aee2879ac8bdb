#!/usr/bin/env python
"""Pretrain a ResNet with MoCo v1 or v2, end-to-end or with a memory bank, on unlabelled images.

    python pretrain/main.py DATA --recipe configs/pretrain/moco_v2_r50.yaml
    torchrun --nproc_per_node 8 pretrain/main.py DATA --recipe configs/pretrain/moco_v2_r50.yaml

Flags are those of facebookresearch/moco's main_moco.py, with a few more.
"""

try:
    from moco_det.common.errors import start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from pretrain.flags.pretraining import parse_pretraining

if __name__ == "__main__":
    start_command(parse_pretraining)  # --help and mistakes end before the imports that take seconds

import argparse

import torch

from pretrain.flags.launch import launch
from pretrain.run import train


def pretrain(args: argparse.Namespace, device: torch.device) -> None:
    """From images to a checkpoint, on `device`; one of the run's processes."""
    train(args, device)


if __name__ == "__main__":
    launch(pretrain, parse_pretraining)
