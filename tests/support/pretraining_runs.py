"""What a run of pretraining or of a classifier has left in its folder."""

import json
from pathlib import Path

import torch

from pretrain.engine.checkpoints import LAST


def checkpoint(output: Path, name: str = LAST) -> dict:
    return torch.load(output / name, weights_only=True)


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def values(output: Path, name: str) -> list[float]:
    """Those of all records that have one of that name."""
    return [record[name] for record in records(output) if name in record]
