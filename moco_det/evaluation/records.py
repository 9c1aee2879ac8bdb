"""What both engines end in: predictions on disk, and results held against what was expected."""

import json
import math
import re
from pathlib import Path

import torch

from moco_det.errors import UserError


def save_predictions(output_dir: str, name: str, predictions: list[dict]) -> None:
    """Write the detections on data set `name` to OUTPUT_DIR/inference/<name>.json, as a list.

    A folder named as a data set becomes a file name by `_` for all but letters, digits and `-`.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(output_dir) / "inference" / f"{re.sub(r'[^A-Za-z0-9-]+', '_', name)}.json"
    plain = [
        {key: value.tolist() if torch.is_tensor(value) else value for key, value in found.items()}
        for found in predictions
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plain))
    except OSError as error:
        raise UserError(f"cannot write detections to {path}: {error.strerror}") from error


def verify_results(expected: list, results: dict) -> None:
    """Hold `results` against TEST.EXPECTED_RESULTS, entries [task, metric, value, tolerance].

    Raises:
        UserError: names every metric that is absent, not finite, or further off than allowed.
    """
    missed = []
    for task, metric, value, tolerance in expected:
        actual = results.get(task, {}).get(metric, math.nan)
        if not abs(actual - value) <= tolerance:
            missed.append(f"{task}/{metric} is {actual:.4g}, expected {value} +- {tolerance}")
    if missed:
        raise UserError(f"TEST.EXPECTED_RESULTS missed: {'; '.join(missed)}")
    if expected:
        print("TEST.EXPECTED_RESULTS met", flush=True)
