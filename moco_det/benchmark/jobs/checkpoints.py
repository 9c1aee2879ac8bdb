"""The checkpoints that a user gives: which row each is, and its converted weights."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from moco_det.benchmark.jobs.grid import DEFAULT_ROW
from moco_det.benchmark.jobs.steps import Step, StepFailed, run_steps
from moco_det.common.errors import UserError
from moco_det.common.files import file_hash
from moco_det.weights.files import read_state_dict
from moco_det.weights.names import DETECTRON2, Layout, find_layout


def named_checkpoints(words: Sequence[str], default: str = DEFAULT_ROW) -> dict[str, Path]:
    """`NAME=CKPT`, or `CKPT` for the row `default` -> {row: file}.

    Raises:
        UserError: a name that is given twice, is none or is `random`; a missing file.
    """
    checkpoints: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        name, path = (name, Path(path)) if equals else (default, Path(word))
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name == "random":
            raise UserError(f"--weights {word}: {name!r} cannot name a row: use letters, digits, _")
        if name in checkpoints:
            raise UserError(f"--weights: two checkpoints for the row {name}: write NAME=CKPT")
        if not path.is_file():
            raise UserError(f"--weights {word}: {path} is not a file")
        checkpoints[name] = path.resolve()
    return checkpoints


def weight_file(name: str, source: Path, output: Path) -> Path:
    """Where the weights of a row are: the file itself where it is Detectron2's already.

    A file that is still to be made, by a pretraining, is taken for a checkpoint.
    """
    is_detectron2 = source.is_file() and _layout(source) is DETECTRON2
    return source if is_detectron2 else output / "weights" / f"{name}.pkl"


def _layout(source: Path) -> Layout | None:
    return find_layout(read_state_dict(source)[0])


def convert(checkpoints: Mapping[str, Path], output: Path, repository: Path) -> None:
    """Make the files that `weight_file` names, but for those that are there already.

    Raises:
        UserError: a checkpoint cannot be converted, or another one than before is given for a row.
    """
    steps, notes = [], {}
    for name, source in checkpoints.items():
        target = weight_file(name, source, output)
        if target == source:
            continue
        note, content = target.with_suffix(".json"), {"hash": file_hash(source)}
        if target.is_file() and note.is_file():
            known = json.loads(note.read_text())
            if known["hash"] != content["hash"]:
                raise UserError(
                    f"{target} was made from {known['source']}, which was another checkpoint than "
                    f"{source}: name another row or another --output"
                )
            continue
        command = [sys.executable, str(repository / "tools/convert_to_d2.py"), source, target]
        steps.append(Step(f"convert {name}", "convert", [str(word) for word in command], 15))
        notes[note] = content | {"source": str(source)}
    (output / "weights").mkdir(parents=True, exist_ok=True)
    try:
        run_steps(steps, output / "weights/log.txt")
    except StepFailed as failure:
        raise UserError(str(failure)) from failure
    for note, content in notes.items():
        note.write_text(json.dumps(content) + "\n")
