"""Process RANK of two that pretrains and writes down which images each step was trained on.

python recorded_run.py RANK STORE RUNS, with RUNS a JSON list of main.py's arguments
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
import webdataset

from pretrain.data.augmentations import MoCoAugmentation
from pretrain.engine.pretraining import MoCoPretraining
from pretrain.flags.pretraining import parse_pretraining
from pretrain.main import pretrain

SIZE = 32


def numbered_image(number: int) -> bytes:
    """A PNG of noise whose first pixel is the image's number."""
    image = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    image[0, 0] = number
    return cv2.imencode(".png", image)[1].tobytes()


def write_shards(folder: Path, counts: list[int]) -> str:
    """A shard of numbered images for each of `counts`; their pattern."""
    number = 0
    for shard, count in enumerate(counts):
        with webdataset.TarWriter(str(folder / f"train-{shard:02d}.tar")) as writer:
            for _ in range(count):
                image = numbered_image(number)
                writer.write({"__key__": f"{number:04d}", "cls": str(number), "png": image})
                number += 1
    return str(folder / f"train-{{00..{len(counts) - 1:02d}}}.tar")


def record_steps(output: Path, rank: int) -> None:
    """Let each step append [step, numbers of its images] to OUTPUT/seen.RANK."""

    def recorded(self, batch, step):
        numbers = batch.views[0][:, 0, 0, 0].tolist()
        with open(output / f"seen.{rank}", "a") as file:
            file.write(json.dumps([step, numbers]) + "\n")
        return train_step(self, batch, step)

    MoCoPretraining.step = recorded


if __name__ == "__main__":
    number, store, runs = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(1)
    train_step = MoCoPretraining.step
    MoCoAugmentation.view = lambda self, image, drawn, reduction: image
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    for arguments in runs:
        args = parse_pretraining(arguments)
        record_steps(Path(args.output), number)
        pretrain(args, torch.device("cpu"))
    dist.destroy_process_group()
