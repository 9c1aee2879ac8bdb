"""How many images a second an engine evaluates, from files to metrics."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from moco_det.benchmark.speed import DetectorTask
from moco_det.benchmark.synthetic.images import CLASSES
from moco_det.benchmark.synthetic.tasks import write_scenes
from moco_det.common.errors import UserError
from moco_det.common.installation import own_file


def evaluation_rates(
    engines: Sequence[str],
    config_file: str,
    opts: Sequence[str],
    images: int,
    folder: Path,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Images per second of `tools/train_net.py --eval-only` on drawn scenes: reading, inference,
    masks, metrics.

    What a process takes to start is left out: the rate is of the images that the longer of two
    runs has more.

    Args:
        config_file: of a detector of boxes and masks; its number of classes is that of the scenes.
        images: of the shorter run; the longer has three times as many.
        folder: for what is drawn and written.
    """
    write_scenes(folder, "test", seed=0, count=3 * images)
    whole = json.loads((folder / "scenes/instances_test.json").read_text())
    for name, count in (("few", images), ("many", 3 * images)):
        kept = {picture["id"] for picture in whole["images"][:count]}
        parts = {
            "images": whole["images"][:count],
            "annotations": [a for a in whole["annotations"] if a["image_id"] in kept],
        }
        (folder / f"{name}.json").write_text(json.dumps(whole | parts))
    opts = [*opts, "MODEL.ROI_HEADS.NUM_CLASSES", str(len(CLASSES))]
    task = DetectorTask(config_file, (*opts, "MODEL.WEIGHTS", ""), 96, 128, 1)
    torch.save({"model": task.weights()}, folder / "weights.pth")
    rates = {}
    for engine in engines:
        seconds = {
            name: _evaluate(engine, config_file, opts, folder, name, clock)
            for name in ("few", "many")
        }
        rates[engine] = 2 * images / (seconds["many"] - seconds["few"])
    return rates


def _evaluate(engine, config_file, opts, folder: Path, name: str, clock) -> float:
    """Seconds of the whole command."""
    dataset = f"('coco:{folder / name}.json:{folder / 'scenes/JPEGImages'}',)"
    command = [
        sys.executable, str(own_file("tools/train_net.py")), "--eval-only", "--engine", engine,
        "--config-file", config_file, *opts, "MODEL.WEIGHTS", str(folder / "weights.pth"),
        "DATASETS.TRAIN", dataset, "DATASETS.TEST", dataset,
        "OUTPUT_DIR", str(folder / f"{engine}_{name}"),
    ]  # fmt: skip
    begun = clock()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or ["train_net.py failed"])[-1])
    return clock() - begun
