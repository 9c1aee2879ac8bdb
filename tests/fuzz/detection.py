"""Data sets through the commands that read them, and what these must agree on."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_semantic import write_tiny_segmentor, write_tiny_semantic
from tiny_voc import write_tiny_config, write_tiny_voc

from tests.fuzz.sandbox import Step, run_call, run_command
from tests.fuzz.subjects import NATIVE, SHORT, TRAIN, complaint

MASKS = [
    "MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8",
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "7",
]  # fmt: skip
KEYPOINTS = [
    "MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3",
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)", "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]",
]  # fmt: skip


# -- commands, and what they must agree on --------------------------------------------------------


def drive(
    rng: random.Random,
    folder: Path,
    config: Path,
    name: str,
    options: Sequence[object],
    must: str,
    training: float = 0.12,
) -> str:
    """The commands that read a data set; what is wrong with what they say of it.

    Args:
        name: of the data set, as a config writes it.
        must: "refuse", "accept" or "any"; see `subjects.complaint`.
        training: how often a detector is trained too.
    """
    names = f"('{name}',)"
    options = [*options, "DATASETS.TRAIN", names, "DATASETS.TEST", names]
    order = rng.sample(("check_data", "visualize", "read"), 3)
    steps = {}
    for command in order:
        if command == "check_data":
            arguments = ("--config-file", config, *options)
            steps[command] = run_command(folder, "tools/check_data.py", *arguments)
        elif command == "visualize":
            steps[command] = run_command(folder, "tools/visualize.py", "--dataset", name,
                                         "--limit", 2, "--output", folder / "drawn")  # fmt: skip
        else:
            steps[command] = run_call(folder, command, lambda: read_and_score(name))
    if rng.random() < training or must == "accept":
        options = [*SHORT, *options, "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", folder / "run"]
        steps["train"] = run_command(folder, TRAIN, *NATIVE, "--config-file", config, *options)
    return disagreement(steps, must)


def read_and_score(name: str) -> None:
    """The records of a data set, then its own boxes as predictions: prints their AP."""
    from moco_det.common.errors import exit_cleanly
    from moco_det.datasets import get_dataset
    from moco_det.evaluation import evaluate

    with exit_cleanly():
        dataset = get_dataset(name)
        records = dataset.records()
        if dataset.evaluator == "sem_seg":
            return
        predictions = []
        for record in records:
            objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
            if len({str((a["category_id"], a["bbox"])) for a in objects}) < len(objects):
                return  # of two equal objects, metrics may take one
            found = {
                "image_id": record["image_id"],
                "boxes": [a["bbox"] for a in objects],
                "scores": [0.9] * len(objects),
                "classes": [a["category_id"] for a in objects],
            }
            if dataset.evaluator == "cityscapes":
                found["segmentations"] = [a["segmentation"] for a in objects]
            predictions.append(found)
        results = evaluate(dataset, predictions)
        task = "segm" if dataset.evaluator == "cityscapes" else "bbox"
        print(f"AP {results[task]['AP']:.2f}")


def disagreement(steps: dict[str, Step], must: str) -> str:
    doctor, read, train = (steps.get(name) for name in ("check_data", "read", "train"))
    if must in ("refuse", "accept"):
        for step in (doctor, train, *([read] if must == "accept" else [])):
            found = complaint(step, must) if step else ""
            if found:
                return found
    if doctor.accepted:
        for step in (read, train):
            if step and not step.accepted:
                return f"check_data passed what {step.name} refused: {step.message or step.out}"
        ap = re.search(r"AP (\S+)", read.out)
        if ap and float(ap[1]) < 99.99:
            return f"the file's own boxes score AP {ap[1]}"
    return ""


# -- whole files


def picture(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 160, (6, 8, 3), dtype=np.uint8))
    pixels = np.array(small.resize((64, 48), Image.Resampling.BICUBIC))
    pixels[4:24, 4:20], pixels[10:40, 30:50] = (240, 60, 60), (60, 240, 60)
    return Image.fromarray(pixels)


def prepare_voc(corpus: Path) -> None:
    write_tiny_config(corpus / "detector.yaml", write_tiny_voc(corpus / "voc", images=6))
    write_tiny_semantic(corpus / "semantic", images=4)
    write_tiny_segmentor(corpus / "segmentor.yaml", corpus / "semantic")
