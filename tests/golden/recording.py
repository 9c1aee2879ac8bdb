"""What the recorders share: where numbers come from, and how they are kept.

    PYTHONPATH=DETECTRON2 python tests/golden/record_NAME.py [COMMIT]

A recorder has a function `record`, which asks Detectron2's public API for the content of one file,
and the cases that it asks about, for the tests to put to the native engine. It imports Detectron2
only to record. COMMIT: of a Detectron2 that is not a git checkout.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent


def source() -> dict[str, str]:
    """Version and commit of the Detectron2 that is imported."""
    import detectron2

    commit = sys.argv[1] if len(sys.argv) > 1 else _commit_of(Path(detectron2.__file__).parent)
    return {"version": detectron2.__version__, "commit": commit}


def _commit_of(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def coco_metadata(content: dict[str, Any]) -> Iterator[str]:
    """While open, a data set in Detectron2's catalog whose annotation file has that content."""
    from detectron2.data import MetadataCatalog
    from detectron2.data.datasets import load_coco_json

    name = "golden"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.json"
        path.write_text(json.dumps(content))
        load_coco_json(str(path), folder, name)  # fills in the metadata
        MetadataCatalog.get(name).json_file = str(path)
        try:
            yield name
        finally:
            MetadataCatalog.remove(name)


def as_instances(detections: dict[str, Any]):
    """One image's detections, arrays of D rows, as Detectron2's model returns them."""
    from detectron2.structures import Boxes, Instances

    instances = Instances(detections["masks"].shape[1:])
    instances.pred_boxes = Boxes(torch.tensor(detections["boxes"], dtype=torch.float32))
    instances.scores = torch.tensor(detections["scores"], dtype=torch.float32)
    instances.pred_classes = torch.tensor(detections["classes"])
    instances.pred_masks = torch.tensor(detections["masks"])
    if "keypoints" in detections:
        instances.pred_keypoints = torch.tensor(detections["keypoints"], dtype=torch.float32)
    return instances


def evaluate(evaluator, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> dict:
    """What one of Detectron2's evaluators makes of a model's outputs, image by image."""
    evaluator.reset()
    for image, output in zip(inputs, outputs, strict=True):
        evaluator.process([image], [output])
    return dict(evaluator.evaluate())


def write(name: str, content: dict[str, Any]) -> None:
    """The file detectron2_`name`.json, one line for each entry."""
    entries = {"detectron2": source(), **content}
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
    (FOLDER / f"detectron2_{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read(name: str) -> dict[str, Any]:
    """The content of detectron2_`name`.json, with its source under "detectron2"."""
    return json.loads((FOLDER / f"detectron2_{name}.json").read_text())
