"""What the recorders share: where numbers come from, and how they are kept.

    PYTHONPATH=DETECTRON2 python tests/golden/record_NAME.py [COMMIT]

A recorder has a function `record`, which asks Detectron2's public API for the content of one file,
and the cases that it asks about, for the tests to put to the native engine. It imports Detectron2
only to record. COMMIT: of a Detectron2 that is not a git checkout.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def source() -> dict[str, str]:
    """Version and commit of the Detectron2 that is imported."""
    import detectron2

    commit = sys.argv[1] if len(sys.argv) > 1 else _commit_of(Path(detectron2.__file__).parent)
    return {"version": detectron2.__version__, "commit": commit}


def _commit_of(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write(name: str, content: dict[str, Any]) -> None:
    """The file detectron2_`name`.json, one line for each entry."""
    entries = {"detectron2": source(), **content}
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
    (FOLDER / f"detectron2_{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read(name: str) -> dict[str, Any]:
    """The content of detectron2_`name`.json, with its source under "detectron2"."""
    return json.loads((FOLDER / f"detectron2_{name}.json").read_text())
