#!/usr/bin/env python
"""Pretrain a ResNet with MoCo v1 or v2, or the mechanisms beside it, on unlabelled images.

    python pretrain/main.py DATA --recipe configs/pretrain/moco_v2_r50.yaml
    torchrun --nproc_per_node 8 pretrain/main.py DATA --recipe configs/pretrain/moco_v2_r50.yaml

Flags are those of facebookresearch/moco's main_moco.py, with a few more.
"""

import sys

from pretrain.engine.training import train
from pretrain.flags import launch, parse

if __name__ == "__main__":
    launch(train, lambda: parse(sys.argv[1:]))
