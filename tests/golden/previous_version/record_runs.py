"""What an earlier version wrote, and what it made of it: runs.tar.xz and runs.json.

    python tests/golden/previous_version/record_runs.py CHECKOUT

CHECKOUT is that version's. Its commands begin small runs and are ended within an epoch; then the
checkpoints' arrays are made to repeat themselves, so that they take kilobytes (keys, shapes, types
and all that is no float stay); and then its commands go on from there: what they come to is kept.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

from previous_runs import (  # noqa: E402
    COMMANDS,
    CONVERT,
    PRETRAINED,
    read_metrics,
    resume_command,
    summary,
    write_data,
)

HERE = Path(__file__).parent
PERIOD = 251  # a prime, so that rows of an array differ: none has its length or a multiple
STEPS = {"linear": 2, "finetuning": 2}  # after which they are killed


def run(checkout: Path, command: list[str], steps: int | None = None, codes=(0,)) -> str:
    """The command's output; with `steps`, until it has reported as many, and killed then."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(checkout / command[0]), *command[1:]],
        env=environment, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        printed = ""
        for line in process.stdout:
            printed += line
            if steps is not None and "loss" in line:
                steps -= 1
                if not steps:
                    process.kill()
    if steps is None and process.returncode not in codes:
        sys.exit(f"{' '.join(command)} failed")
    return printed


def begin(checkout: Path, name: str) -> None:
    """Leave a run as it is after its second step."""
    if name in PRETRAINED:
        run(checkout, [*COMMANDS[name], "--iterations", "2"])
    elif name == "detector":
        run(checkout, [*COMMANDS[name], "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0"])
        Path("detector/model_final.pth").rename("detector/model_0000001.pth")
        Path("detector/last_checkpoint").write_text("model_0000001.pth")
        shutil.rmtree("detector/inference", ignore_errors=True)
    else:
        run(checkout, COMMANDS[name], STEPS[name])


def make_compressible(value):
    """Nested content with float arrays that repeat their first numbers, rounded to bfloat16."""
    if isinstance(value, dict):
        return type(value)((key, make_compressible(entry)) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return type(value)(map(make_compressible, value))
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.numel() < 2:
        return value
    flat = value.flatten().bfloat16().to(value.dtype)
    if len(flat) > 4 * PERIOD:
        flat = flat[:PERIOD].repeat(-(-len(flat) // PERIOD))[: len(flat)]
    return flat.reshape(value.shape)


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    os.chdir(tempfile.mkdtemp())
    write_data(Path())
    for name in COMMANDS:
        begin(checkout, name)
        for path in Path(name).iterdir():
            if path.name.startswith("checkpoint_last") or path.suffix == ".pth":
                torch.save(make_compressible(torch.load(path, weights_only=True)), path)
            elif path.name.startswith(("events.", "checkpoint_", "best", "model_best")):
                path.unlink()
        if name == "moco":
            run(checkout, [*CONVERT, "moco.pkl"])
    found = {"doctor": run(checkout, ["pretrain/doctor.py", "moco"], codes=(0, 1))}
    with tarfile.open(HERE / "runs.tar.xz", "w:xz", preset=9) as archive:
        for name in (*COMMANDS, "moco.pkl"):
            archive.add(name, filter=anonymous)
        begun = Path.cwd()
        for name in COMMANDS:
            os.chdir(shutil.copytree(begun, Path(tempfile.mkdtemp()) / "copy"))
            before = len(read_metrics(Path(), name))
            run(checkout, resume_command(name, checkout))
            found[name] = summary(Path(), name, before)
        for name in ("metrics.json", "config.yaml"):
            archive.add(f"detector/{name}", f"finished/{name}", filter=anonymous)
        found["compare"] = run(checkout, ["tools/compare.py", "moco=detector"])
    version = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    content = {"commit": version.stdout.strip(), **found}
    text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in content.items())
    (HERE / "runs.json").write_text("{\n" + text + "\n}\n")


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the owner and the time."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main()
