"""Whether a test and the commands that it starts see the GPUs of this machine."""

import os

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"

_found = torch.cuda.is_available, torch.cuda.device_count, os.environ.get(VISIBLE)


def hide_gpus() -> None:
    """As on a machine without one; what this process has computed on them stays where it is."""
    torch.cuda.is_available, torch.cuda.device_count = (lambda: False), (lambda: 0)
    os.environ[VISIBLE] = ""


def show_gpus() -> None:
    """As this process found the machine."""
    torch.cuda.is_available, torch.cuda.device_count, visible = _found
    os.environ.pop(VISIBLE, None)
    if visible is not None:
        os.environ[VISIBLE] = visible
